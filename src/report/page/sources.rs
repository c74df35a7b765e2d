//! Every row as it was measured, and where each file comes from.

use super::entries::Entry;
use super::paths::shown;
use super::{PageInput, Section, Table, compared, middle, number, plural, times};
use crate::report::file::File;

pub(super) fn all_rows(entries: &[Entry<'_>], inputs: &[PageInput]) -> Section {
    let mut section = Section { id: "rows".into(), title: "All rows".into(), ..Section::default() };
    section.text.push(
        "ms: the median, and the middle half of the samples (all of them where a file says no more). vs dense: \
         against the dense row of the same file; \"same\" where the middle halves overlap, or the \
         file says that the ratio is noise. err/bound: the largest \
         error over what the arithmetic may lose; 1 is the limit."
            .into(),
    );
    let head = [
        "layer",
        "shape",
        "type",
        "op",
        "#ms",
        "#middle half, ms",
        "#effective, TFLOPS",
        "#executed, TFLOPS",
        "#vs dense",
        "than dense",
        "#err/bound",
        "kernel",
        "command",
    ];
    for (at, input) in inputs.iter().enumerate() {
        let rows: Vec<_> = entries.iter().filter(|e| e.file == at).collect();
        let Some(first) = rows.first() else { continue };
        let caption = format!("{}: {} on {}", shown(&input.name), first.machine.program, first.machine.place);
        let mut table = Table::new(caption, true, &head);
        table.rows.extend(rows.iter().map(|e| {
            let row = e.row;
            let verdict = if e.ratio().is_some() { compared(e.against_dense()) } else { "-" };
            vec![
                row.name.clone(),
                row.shape(),
                row.dtype.clone(),
                e.what(),
                if row.verified { number(row.times.median, 4) } else { "FAILED".into() },
                middle(row.times),
                number(row.effective_tflops, 3),
                number(row.executed_tflops, 3),
                e.ratio().or(row.speedup_vs_dense).map_or_else(|| "-".into(), times),
                verdict.into(),
                number(row.error_over_bound, 2),
                row.kernel.clone(),
                shown(&row.command),
            ]
        }));
        section.tables.push(table);
    }
    section
}

pub(super) fn origins(inputs: &[PageInput]) -> Section {
    let mut section =
        Section { id: "environment".into(), title: "Environments and commands".into(), ..Section::default() };
    let head = ["file", "program", "device", "driver", "system", "sampling", "commit", "date", "command"];
    section.text.push("Of paths outside the folder that a command ran in, the last part is shown.".into());
    let mut table = Table::new("Where each file comes from", false, &head);
    for input in inputs {
        if let File::Compile(compile) = &input.file {
            let gap = || "-".to_owned();
            table.rows.push(vec![
                shown(&input.name),
                format!("{} {}", compile.program, compile.version),
                format!("{} (compiled for, nothing run)", compile.device.name),
                compile.device.driver.clone(),
                gap(),
                gap(),
                compile.commit.clone().unwrap_or_else(gap),
                compile.date.clone(),
                shown(&compile.command),
            ]);
            continue;
        }
        let Some(origin) = input.file.origin() else {
            let gap = std::iter::repeat_n("-".to_owned(), head.len() - 2);
            let row = [shown(&input.name)].into_iter().chain(gap).chain([shown(input.file.command())]);
            table.rows.push(row.collect());
            continue;
        };
        let or = |x: &Option<String>| x.clone().unwrap_or_else(|| "-".into());
        let libraries = origin.libraries.iter().map(|(name, version)| format!(", {name} {version}"));
        let details: Vec<_> = [origin.simd.clone(), origin.threads.map(|t| plural(t, "thread"))]
            .into_iter()
            .flatten()
            .chain(origin.shader_checks.iter().map(|c| format!("{c} shaders")))
            .chain(origin.tuning.iter().map(|t| format!("tuning {t}")))
            .collect();
        let sampling =
            origin.samples.zip(origin.sample_ms).map(|(n, ms)| format!("{} of {ms} ms or more", plural(n, "sample")));
        table.rows.push(vec![
            shown(&input.name),
            format!("{} {}{}", origin.program, origin.version, libraries.collect::<String>()),
            format!("{} ({}; {})", origin.device, origin.kind, details.join(", ")),
            [&origin.driver, &origin.backend].map(or).join(", "),
            format!("{} {}, {}", origin.os, origin.arch, origin.cpu),
            or(&sampling),
            or(&origin.commit),
            origin.date.clone(),
            shown(&origin.command),
        ]);
    }
    section.tables.push(table);
    section
}
