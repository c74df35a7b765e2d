//! What bounds products: operations per byte under the measured ceilings, and the bytes that 2:4 saves.

use super::entries::{Entry, what};
use super::{PageInput, Section, Table, distinct, numbered};
use crate::error::Result;
use crate::measure::{Ceilings, Summary};
use crate::report::chart::{Axis, Bar, Bars, Ink, Plot, Series};
use crate::report::file::{File, Row};
use crate::report::significant;

/// Bytes of an element.
fn size(dtype: &str) -> f64 {
    if matches!(dtype, "f16" | "bf16") { 2.0 } else { 4.0 }
}

pub(super) fn rooflines(inputs: &[PageInput], entries: &[Entry<'_>], places: &[String]) -> Result<Option<Section>> {
    let mut section = Section {
        id: "roofline".into(),
        title: "Roofline".into(),
        text: vec![
            "Executed operations a second (what was skipped is not counted) over executed operations per byte of \
             weights, activations and output, each counted once. The broken lines are the ceilings that were \
             measured in the same runs, the highest of each. Rows above the slope found operands in a cache."
                .into(),
        ],
        ..Section::default()
    };
    for place in places {
        let here: Vec<_> = entries.iter().filter(|e| e.machine.own && &e.machine.place == place).collect();
        for dtype in distinct(here.iter().map(|e| e.row.dtype.clone())) {
            let of = |e: &&&Entry<'_>| e.row.dtype == dtype;
            let point = |e: &Entry<'_>| {
                let Row { n, m, k, executed_tflops, weight_bytes, times, .. } = e.row;
                let bytes = (*weight_bytes)? as f64 + size(&dtype) * (*n as f64 * (*k as f64 + *m as f64));
                let tflops = (*executed_tflops)?;
                Some((tflops * 1e9 * times.median? / bytes, tflops))
            };
            let kinds = distinct(here.iter().filter(of).map(|e| (&e.row.op, e.row.vector)));
            let series: Vec<_> = kinds
                .into_iter()
                .filter_map(|(op, vector)| {
                    let rows = here.iter().filter(of).filter(|e| (&e.row.op, e.row.vector) == (op, vector));
                    let points: Vec<_> = rows.filter_map(|e| point(e)).collect();
                    let (ink, name) = (Ink::of(op, vector), what(op, vector));
                    (!points.is_empty()).then_some(Series { ink, name, points, joined: false })
                })
                .collect();
            if series.is_empty() {
                continue;
            }
            let files = distinct(here.iter().filter(of).map(|e| e.file));
            let best = |of: fn(&Ceilings) -> Option<f64>| {
                let known = files.iter().filter_map(|at| match &inputs[*at].file {
                    File::Bench(bench) => of(&bench.ceilings),
                    _ => None,
                });
                known.reduce(f64::max)
            };
            let slope = best(|c| c.copy_gb_per_s.or(c.read_gb_per_s)).map(|gb| gb / 1e3);
            let flat = [
                ("f32 multiply-adds", best(|c| c.fma_f32_tflops)),
                ("f16 multiply-adds", best(|c| c.fma_f16_tflops).filter(|_| dtype == "f16")),
                ("cooperative matrices", best(|c| c.cooperative_f16_tflops).filter(|_| dtype == "f16")),
            ];
            let xs = || series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
            let (low, high) = (xs().fold(f64::INFINITY, f64::min), xs().fold(0.0, f64::max));
            let top = flat.iter().filter_map(|f| f.1).fold(0.0, f64::max);
            let mut roofs = Vec::new();
            if let Some(slope) = slope {
                let end = if top > 0.0 { top / slope } else { high };
                roofs.push((
                    vec![(low.min(end), slope * low.min(end)), (end, slope * end)],
                    format!("memory, {} GB/s", significant(slope * 1e3, 3)),
                ));
            }
            for (name, tflops) in flat {
                let Some(tflops) = tflops else { continue };
                let knee = slope.map_or(low, |slope| tflops / slope);
                roofs.push((
                    vec![(knee.min(high), tflops), (high.max(knee), tflops)],
                    format!("{name}, {} TFLOPS", significant(tflops, 3)),
                ));
            }
            let title = format!("{place}, {dtype}");
            if roofs.is_empty() {
                section.text.push(format!("{title}: no ceilings are measured on this device, so there is no roof."));
            }
            let plot = Plot {
                x: Axis { name: "executed operations per byte".into(), log: true },
                y: Axis { name: "executed TFLOPS".into(), log: true },
                series,
                roofs,
            };
            let alt = format!(
                "Roofline of {title}: executed TFLOPS against operations per byte, under the measured ceilings"
            );
            let name = numbered("roofline", &section);
            section.charts.push(plot.chart(&name, &title, &alt)?);
        }
    }
    Ok((!section.charts.is_empty()).then_some(section))
}

pub(super) fn bytes(entries: &[Entry<'_>]) -> Result<Option<Section>> {
    let mut table = Table::new("Bytes of the weights", true, &["type", "op", "#of dense", "#saved", "shapes"]);
    let mut bars = Vec::new();
    let own: Vec<_> = entries.iter().filter(|e| e.machine.own && e.row.op != "auto").collect();
    for (dtype, op, vector) in distinct(own.iter().map(|e| (&e.row.dtype, &e.row.op, e.row.vector))) {
        let mut shares = Vec::new();
        for e in own.iter().filter(|e| (&e.row.dtype, &e.row.op, e.row.vector) == (dtype, op, vector)) {
            let dense = size(dtype) * e.row.m as f64 * e.row.k as f64;
            shares.extend(e.row.weight_bytes.map(|bytes| 100.0 * bytes as f64 / dense));
        }
        let Some(Summary { min, median, max, .. }) = Summary::of(&mut shares) else { continue };
        let percent = |x: f64| format!("{x:.1} %");
        bars.push(Bar {
            label: format!("{} {dtype}", what(op, vector)),
            parts: vec![(median, Ink::of(op, vector))],
            spread: None,
            text: percent(median),
        });
        let range = if max - min < 0.05 { "all alike".into() } else { format!("{} to {}", percent(min), percent(max)) };
        table.rows.push(vec![dtype.clone(), what(op, vector), percent(median), percent(100.0 - median), range]);
    }
    if bars.is_empty() {
        return Ok(None);
    }
    let bars = Bars {
        unit: "% of the bytes of dense weights".into(),
        groups: vec![("Weights on the device, metadata included".into(), bars)],
        marks: vec![(100.0, "dense".into())],
        legend: Vec::new(),
    };
    let alt = "Bars of the bytes of weights as a share of dense ones; the numbers are in the table below";
    Ok(Some(Section {
        id: "bytes".into(),
        title: "Bytes saved".into(),
        text: vec!["The median over shapes; padding makes small or ragged ones larger.".into()],
        charts: vec![bars.chart("bytes", "Bytes of the weights", alt)?],
        tables: vec![table],
    }))
}
