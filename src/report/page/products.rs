//! Single products: what 2:4 bought by shape, by tokens, beside other programs and from machine to machine.

use std::cmp::Ordering;

use super::entries::{Entry, what};
use super::{Section, Table, distinct, number, numbered, times};
use crate::error::Result;
use crate::measure::Summary;
use crate::report::chart::{Axis, Bar, Bars, Ink, Plot, Series};
use crate::report::datasheet::CLAIMS;

/// What 2:4 bought on one machine, in a few sentences.
///
/// Invariant: each row is in exactly one clause. A figure that praises is of rows that are faster beyond the noise;
/// what is within it, was not told apart or failed is said to be so.
pub(super) fn answer(place: &str, entries: &[Entry<'_>]) -> Option<String> {
    let own: Vec<_> = entries.iter().filter(|e| e.machine.own && e.machine.place == place).collect();
    let op = if own.iter().any(|e| e.row.op == "sparse24") { "sparse24" } else { "auto" };
    let mut said = Vec::new();
    for dtype in distinct(own.iter().map(|e| e.row.dtype.clone())) {
        let of = |vector| own.iter().copied().filter(move |e| e.row.op == op && e.row.vector == Some(vector));
        let rows_of = |vector| of(vector).filter(|e| e.row.dtype == dtype).collect::<Vec<_>>();
        // Standard 2:4, and the V that gained most; all others are on the charts. What is within noise is as
        // fast as dense.
        let median_of = |vector| {
            let gain = |e: &Entry<'_>| match e.against_dense() {
                Some(Ordering::Less | Ordering::Greater) => e.ratio(),
                _ => e.ratio().map(|_| 1.0),
            };
            let mut ratios: Vec<_> = rows_of(vector).into_iter().filter_map(gain).collect();
            Summary::of(&mut ratios).map_or(0.0, |of| of.median)
        };
        let vectors = own.iter().filter(|e| e.row.op == op && e.row.dtype == dtype).filter_map(|e| e.row.vector);
        let mut vectors = distinct(vectors);
        vectors.sort_by(|a, b| median_of(*b).total_cmp(&median_of(*a)));
        let best = vectors.first().copied();
        for vector in distinct(vectors.iter().copied().filter(|v| *v == 1).chain(best)) {
            if let Some(verdict) = verdict(&rows_of(vector)) {
                said.push(format!("{dtype}, V={vector}: {verdict}"));
            }
        }
    }
    (!said.is_empty())
        .then(|| format!("On {place}, 2:4 against this program's own dense product: {}.", said.join(". ")))
}

/// Where rows of one pattern paid and where not. `None` where nothing was compared.
fn verdict(rows: &[&Entry<'_>]) -> Option<String> {
    let judged: Vec<_> = rows.iter().filter_map(|e| Some((*e, e.ratio()?, e.against_dense()))).collect();
    if judged.is_empty() {
        return None;
    }
    let with = |order| judged.iter().filter(move |(_, _, o)| *o == order).map(|(e, r, _)| (*e, *r)).collect::<Vec<_>>();
    let named = |of: Vec<(&Entry<'_>, f64)>| {
        let names: Vec<_> = of.iter().map(|(e, r)| format!("{} ({})", e.row.shape(), times(*r))).collect();
        match names.len() {
            0..=4 => names.join(", "),
            many => format!("{} and {} more", names[..3].join(", "), many - 3),
        }
    };
    let faster = with(Some(Ordering::Less));
    let least = faster.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    let most = faster.iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let failed: Vec<_> = rows.iter().filter(|e| !e.row.verified).map(|e| e.row.shape()).collect();
    // The rest was not measured against dense.
    let all = judged.len() + failed.len();
    let mut clauses = vec![match (least, most) {
        (Some(least), Some(most)) => {
            let count = match faster.len() {
                1 if all == 1 => String::new(),
                many if many == all => format!("it paid in every one of {all} rows: "),
                some => format!("it paid in {some} of {all} rows: "),
            };
            let figures = match faster.len() {
                1 => format!("{} as fast as dense at {}", times(most.1), most.0.row.shape()),
                _ => format!(
                    "{} to {} as fast as dense, the most at {}",
                    times(least.1),
                    times(most.1),
                    most.0.row.shape()
                ),
            };
            count + &figures
        }
        _ => match all {
            1 => "it did not pay in the one row".to_owned(),
            many => format!("it paid in none of {many} rows"),
        },
    }];
    for (order, what) in [
        (Some(Ordering::Greater), "it was slower at"),
        (Some(Ordering::Equal), "within noise at"),
        (None, "not judged, for want of a spread:"),
    ] {
        let of = with(order);
        if !of.is_empty() {
            clauses.push(format!("{what} {}", named(of)));
        }
    }
    if !failed.is_empty() {
        clauses.push(format!("wrong results, not timed, at {}", failed.join(", ")));
    }
    Some(clauses.join("; "))
}

/// A wide sweep of tokens belongs on the axis of tokens, not among the bars.
const SWEEP: usize = 4;

/// Shapes that are measured at many numbers of tokens, by out and in features and type.
fn swept(entries: &[Entry<'_>], entry: &Entry<'_>) -> bool {
    // Sweeps of other programs stay among the bars.
    let same = |e: &&Entry<'_>| {
        entry.machine.own
            && e.machine == entry.machine
            && (e.row.m, e.row.k, &e.row.dtype) == (entry.row.m, entry.row.k, &entry.row.dtype)
    };
    distinct(entries.iter().filter(same).map(|e| e.row.n)).len() >= SWEEP
}

pub(super) fn speedups(entries: &[Entry<'_>], places: &[String]) -> Result<Section> {
    let mut section = Section {
        id: "speedup".into(),
        title: "Speedup over dense, by shape".into(),
        text: vec![
            "Each program against its own dense product of the same shape, type and run: 1x is dense. The bar is the \
             ratio of medians, the line over it the middle half of the samples (all of them where a file has no \
             quartiles). Shapes are out features x tokens x in features. V is how many rows of weights share a \
             pattern; V=1 is the 2:4 of sparse tensor cores."
                .into(),
        ],
        ..Section::default()
    };
    for place in places {
        let rows = entries.iter().filter(|e| &e.machine.place == place && e.ratio().is_some() && !swept(entries, e));
        let rows: Vec<_> = rows.collect();
        if rows.is_empty() {
            continue;
        }
        let heading = |e: &Entry<'_>| {
            let program = if e.machine.own { String::new() } else { format!(", {}", e.machine.program) };
            format!("{} {}{program}", e.row.shape(), e.row.dtype)
        };
        let groups = distinct(rows.iter().map(|e| heading(e))).into_iter().map(|name| {
            let bars = rows.iter().filter(|e| heading(e) == name).map(|e| Bar {
                label: e.what(),
                parts: vec![(e.ratio().unwrap_or_default(), Ink::of(&e.row.op, e.row.vector))],
                spread: e.spread(),
                text: times(e.ratio().unwrap_or_default()),
            });
            (name.clone(), bars.collect())
        });
        let groups: Vec<_> = groups.collect();
        let bars = Bars {
            unit: "times as fast as dense".into(),
            groups,
            marks: vec![(1.0, "1x: own dense".into())],
            legend: Vec::new(),
        };
        let alt =
            format!("Bars of the speedup over dense on {place}, by shape; the numbers are in the table of all rows");
        section.charts.push(bars.chart(&numbered("speedup", &section), place, &alt)?);
    }
    Ok(section)
}

pub(super) fn by_tokens(entries: &[Entry<'_>], places: &[String]) -> Result<Option<Section>> {
    let mut section = Section {
        id: "tokens".into(),
        title: "Speedup against tokens: where sparse starts to pay".into(),
        text: vec!["It pays from where on every row is faster than dense beyond the noise.".into()],
        ..Section::default()
    };
    for place in places {
        let here: Vec<_> = entries
            .iter()
            .filter(|e| e.machine.own && &e.machine.place == place && e.ratio().is_some() && swept(entries, e))
            .collect();
        for layer in distinct(here.iter().map(|e| (e.row.m, e.row.k, e.row.dtype.clone()))) {
            let (m, k, dtype) = &layer;
            let of = |e: &&&Entry<'_>| (e.row.m, e.row.k, &e.row.dtype) == (*m, *k, dtype);
            let mut series = Vec::new();
            let mut text = Vec::new();
            for (op, vector) in distinct(here.iter().filter(of).map(|e| (e.row.op.clone(), e.row.vector))) {
                let rows = here.iter().filter(of).filter(|e| e.row.op == op && e.row.vector == vector);
                let mut rows: Vec<_> = rows.collect();
                rows.sort_by_key(|e| e.row.n);
                let points: Vec<_> = rows.iter().filter_map(|e| Some((e.row.n as f64, e.ratio()?))).collect();
                let name = what(&op, vector);
                // Beyond the last count at which any row does not pay: one shape can stand in several rows.
                let last = rows.iter().rfind(|e| e.against_dense() != Some(Ordering::Less)).map_or(0, |e| e.row.n);
                let pays = rows.partition_point(|e| e.row.n <= last);
                if vector.is_some() {
                    text.push(match points.get(pays) {
                        Some(_) if pays == 0 => format!("{name} paid at every count"),
                        Some((n, _)) => format!("{name} paid from {n} tokens on"),
                        None => format!("{name} was not faster beyond the noise at the largest count"),
                    });
                }
                series.push(Series { ink: Ink::of(&op, vector), name, points, joined: true });
            }
            let plot = Plot {
                x: Axis { name: "tokens (n)".into(), log: true },
                y: Axis { name: "times as fast as dense".into(), log: false },
                roofs: vec![(ends(&series), "1x: own dense".into())],
                series,
            };
            let title = format!("{m} features from {k}, {dtype}, {place}");
            let alt = format!(
                "Lines of the speedup over dense against tokens, {title}; the numbers are in the table of all rows"
            );
            let name = numbered("tokens", &section);
            section.charts.push(plot.chart(&name, &title, &alt)?);
            section.text.push(format!("{title}: {}.", text.join(", ")));
        }
    }
    Ok((!section.charts.is_empty()).then_some(section))
}

/// A level line at 1 over everything that the series cover.
fn ends(series: &[Series]) -> Vec<(f64, f64)> {
    let xs = || series.iter().flat_map(|s| s.points.iter().map(|p| p.0));
    vec![(xs().fold(f64::INFINITY, f64::min), 1.0), (xs().fold(0.0, f64::max), 1.0)]
}

/// The products of several programs on the same hardware.
pub(super) fn programs(entries: &[Entry<'_>]) -> Result<Option<Section>> {
    let own = |e: &&Entry<'_>| e.machine.own;
    let hardware = distinct(entries.iter().filter(own).chain(entries).map(|e| e.machine.hardware.clone()));
    let mut section = Section {
        id: "programs".into(),
        title: "Beside other programs on the same hardware".into(),
        text: vec![
            "Effective speed, 2mnk over the median time, whatever was skipped. Only shapes that several programs \
             measured on the same device with the same number of threads. Behind each bar: how many times as fast as \
             the fastest dense product of any of them, which is not always this program's. Other programs multiply \
             one set of operands, which caches may hold; this one rotates through several. The table names each \
             clock."
                .into(),
        ],
        ..Section::default()
    };
    let head = ["shape", "type", "program", "op", "#ms", "#effective, GFLOP/s", "#vs fastest dense", "kernel", "clock"];
    for place in &hardware {
        let timed = |e: &&Entry<'_>| &e.machine.hardware == place && e.row.times.median.is_some();
        let here: Vec<_> = entries.iter().filter(timed).collect();
        let mut groups = Vec::new();
        let mut table = Table::new(place.clone(), true, &head);
        for layer in distinct(here.iter().map(|e| e.row.layer())) {
            let rows: Vec<_> = here.iter().filter(|e| e.row.layer() == layer).collect();
            if distinct(rows.iter().map(|e| e.machine.program.clone())).len() < 2 {
                continue;
            }
            let fastest = rows.iter().filter(|e| e.row.op == "dense").filter_map(|e| e.row.times.median);
            let fastest = fastest.fold(f64::INFINITY, f64::min);
            let mut once: Vec<(String, &Entry<'_>)> = Vec::new();
            for entry in &rows {
                let name = format!("{}, {}", entry.machine.program_run(), entry.what());
                // A dense row stands in each of a program's files: the fastest counts, as it does for the others.
                match once.iter_mut().find(|(known, e)| *known == name && e.row.kernel == entry.row.kernel) {
                    Some((_, known)) if entry.row.times.median < known.row.times.median => *known = entry,
                    Some(_) => {}
                    None => once.push((name, entry)),
                }
            }
            once.sort_by(|a, b| {
                a.1.row.times.median.partial_cmp(&b.1.row.times.median).unwrap_or(std::cmp::Ordering::Equal)
            });
            let ratio = |e: &Entry<'_>| e.row.times.median.map(|ms| fastest / ms).filter(|r| r.is_finite() && *r > 0.0);
            let bars = once.iter().map(|(name, e)| Bar {
                label: name.clone(),
                parts: vec![(e.row.effective_tflops.unwrap_or_default() * 1e3, Ink::of(&e.row.op, e.row.vector))],
                spread: None,
                text: ratio(e).map_or_else(String::new, times),
            });
            groups.push((format!("{} {}", rows[0].row.shape(), rows[0].row.dtype), bars.collect::<Vec<_>>()));
            table.rows.extend(once.iter().map(|(_, e)| {
                vec![
                    e.row.shape(),
                    e.row.dtype.clone(),
                    e.machine.program_run(),
                    e.what(),
                    number(e.row.times.median, 4),
                    number(e.row.effective_tflops.map(|t| t * 1e3), 3),
                    ratio(e).map_or_else(|| "-".to_owned(), times),
                    e.row.kernel.clone(),
                    e.row.clock.clone().unwrap_or_else(|| "-".into()),
                ]
            }));
        }
        if groups.is_empty() {
            continue;
        }
        let inks =
            [(Ink::Dense, "dense"), (Ink::Masked, "masked"), (Ink::Vector(0), "2:4, V=1"), (Ink::Vector(5), "V=32")];
        let bars = Bars {
            unit: "effective GFLOP/s".into(),
            groups,
            marks: Vec::new(),
            legend: inks.map(|(ink, name)| (ink, name.to_owned())).to_vec(),
        };
        let alt =
            format!("Bars of the effective speed of several programs on {place}; the numbers are in the table below");
        section.charts.push(bars.chart(&numbered("programs", &section), place, &alt)?);
        section.tables.push(table);
    }
    Ok((!section.charts.is_empty()).then_some(section))
}

/// Machines side by side, each normalised to its own dense, and what data sheets promise.
pub(super) fn machines(entries: &[Entry<'_>], places: &[String]) -> Result<Section> {
    let mut section = Section {
        id: "hardware".into(),
        title: "Hardware side by side, and what was promised".into(),
        text: vec![
            "Every machine against its own dense product, the median over its shapes, and a line from the least to \
             the most. The table says how many of the rows are faster and slower beyond the noise. Machines that \
             measured other shapes are not strictly comparable."
                .into(),
        ],
        ..Section::default()
    };
    let mut measured = Table::new(
        "Measured: times as fast as the machine's own dense",
        false,
        &["machine", "program", "type", "op", "#rows", "#faster", "#slower", "#least", "#median", "#most"],
    );
    let mut groups = Vec::new();
    for place in places {
        let mut bars = Vec::new();
        let here: Vec<_> = entries.iter().filter(|e| &e.machine.place == place && e.ratio().is_some()).collect();
        let kind = |e: &Entry<'_>| {
            (e.machine.program.clone(), e.row.dtype.clone(), e.what(), Ink::of(&e.row.op, e.row.vector), e.machine.own)
        };
        for key in distinct(here.iter().map(|e| kind(e))) {
            let rows: Vec<_> = here.iter().filter(|e| kind(e) == key).collect();
            let beyond = |order| rows.iter().filter(|e| e.against_dense() == Some(order)).count();
            let orders = [Ordering::Less, Ordering::Greater].map(beyond);
            let mut ratios: Vec<_> = rows.iter().filter_map(|e| e.ratio()).collect();
            let Some(Summary { min, median, max, .. }) = Summary::of(&mut ratios) else { continue };
            let (program, dtype, what, ink, own) = key;
            bars.push(Bar {
                label: if own { format!("{what} {dtype}") } else { format!("{program}, {what} {dtype}") },
                parts: vec![(median, ink)],
                spread: Some((min, max)),
                text: times(median),
            });
            let figures = [min, median, max].map(times);
            let counts = [ratios.len(), orders[0], orders[1]].map(|count| count.to_string());
            let row = [place.clone(), program, dtype, what];
            measured.rows.push(row.into_iter().chain(counts).chain(figures).collect());
        }
        if !bars.is_empty() {
            groups.push((place.clone(), bars));
        }
    }
    if !groups.is_empty() {
        let bars = Bars {
            unit: "times as fast as own dense".into(),
            groups,
            marks: vec![(1.0, "1x: own dense".into()), (2.0, "2x: datasheet, not measured".into())],
            legend: Vec::new(),
        };
        let alt =
            "Bars of each machine's median speedup over its own dense, and datasheets' 2x as a line; numbers below";
        section.charts.push(bars.chart("hardware", "Times as fast as own dense", alt)?);
    }
    let mut promised = Table::new(
        "Datasheet, not measured: what vendors and papers claim",
        true,
        &["device", "what", "#dense, TFLOPS", "#2:4, TFLOPS", "#ratio", "claim", "source"],
    );
    promised.rows.extend(CLAIMS.iter().map(|c| {
        let ratio = c.dense.zip(c.sparse).map_or_else(|| "-".to_owned(), |(d, s)| times(s / d));
        let (dense, sparse) = (number(c.dense, 4), number(c.sparse, 4));
        vec![c.device.into(), c.what.into(), dense, sparse, ratio, c.says.into(), format!("{}, {}", c.source, c.url)]
    }));
    section.tables = vec![measured, promised];
    Ok(section)
}
