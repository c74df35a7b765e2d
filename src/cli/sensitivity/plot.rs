//! The plot of a sensitivity analysis: one line for each layer, from the first at the top, and a dot for each pattern,
//! with the interval that it lies in; hollow where the drop is within noise.

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::SegmentValue;
use plotters::prelude::*;

use super::file::{Row, Sensitivity};
use sparse24::VectorLen;
use sparse24::bootstrap::Interval;

/// Colours that people of all colour vision tell apart (Okabe and Ito, "Color Universal Design", 2008), one for each V
/// of the format.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(240, 228, 66),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];

/// Pixels.
const WIDTH: u32 = 900;
const LINE: u32 = 20;
const AROUND: u32 = 130;

/// The analysis as an SVG file.
pub(in crate::cli) fn svg(result: &Sensitivity) -> Result<String> {
    let mut svg = String::new();
    draw(result, &mut svg).map_err(|e| anyhow!("cannot draw the plot: {e}"))?;
    Ok(svg)
}

fn draw(result: &Sensitivity, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let layers = layers(&result.rows);
    let ends = |row: &Row| row.interval.map_or([row.drop; 3], |Interval { low, high }| [low, row.drop, high]);
    let drops = result.rows.iter().flat_map(ends);
    let (low, high) = drops.fold((0f64, 0f64), |(low, high), x| (low.min(x), high.max(x)));
    let span = (high - low).max(1e-9);
    // Room on the right for the legend, so that it covers no dot.
    let x_range = low - 0.03 * span..high + 0.15 * span;

    let area = SVGBackend::with_string(svg, (WIDTH, AROUND + LINE * layers.len() as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let settings = &result.settings;
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{}: one linear layer pruned alone, by {}", result.model, settings.method), ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(50)
        .y_label_area_size(270)
        .build_cartesian_2d(x_range, (0..layers.len()).into_segmented())?;
    // From the bottom up.
    let name = |at: usize| layers.len().checked_sub(1 + at).map_or("", |at| layers[at]);
    let x = match settings.metric.as_str() {
        "spearman" => format!("drop of Spearman's correlation from {:.4} (no unit)", result.dense),
        "log_likelihood" => format!("drop of a token's mean log-probability from {:.4} (nats)", result.dense),
        _ => "1 - mean cosine similarity to the dense embeddings (no unit)".to_owned(),
    };
    let x = format!("{x}; bars: 95 % intervals; hollow: within noise");
    chart
        .configure_mesh()
        .x_desc(x)
        .x_labels(8)
        .y_labels(layers.len())
        .y_label_formatter(&|at| match at {
            SegmentValue::CenterOf(at) | SegmentValue::Exact(at) => name(*at).to_owned(),
            SegmentValue::Last => String::new(),
        })
        .label_style(("sans-serif", 15))
        .light_line_style(TRANSPARENT)
        .draw()?;
    let top = SegmentValue::Last;
    chart.draw_series([PathElement::new([(0.0, SegmentValue::Exact(0)), (0.0, top)], BLACK.mix(0.5))])?;
    for (vector, colour) in VectorLen::ALL.into_iter().zip(COLOURS) {
        let rows: Vec<_> = result.rows.iter().filter(|row| row.vector == vector.get()).collect();
        if rows.is_empty() {
            continue;
        }
        let line = |row: &Row| {
            let at = layers.iter().rposition(|layer| *layer == row.layer)?;
            Some(SegmentValue::CenterOf(layers.len() - 1 - at))
        };
        let bars = rows.iter().filter_map(|row| {
            let (Interval { low, high }, line) = (row.interval?, line(row)?);
            Some(PathElement::new([(low, line.clone()), (high, line)], colour.mix(0.6)))
        });
        chart.draw_series(bars)?;
        let dots = rows.iter().filter_map(|row| {
            let style = if row.is_noise() { ShapeStyle::from(&colour) } else { colour.filled() };
            Some(Circle::new((row.drop, line(row)?), 5, style))
        });
        chart
            .draw_series(dots)?
            .label(format!("V = {vector}"))
            .legend(move |(x, y)| Circle::new((x + 10, y), 5, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 16))
        .draw()?;
    area.present()?;
    Ok(())
}

/// The layers, each once, in the order of the rows, which is the model's.
fn layers(rows: &[Row]) -> Vec<&str> {
    let mut layers: Vec<&str> = Vec::new();
    for row in rows {
        if !layers.contains(&row.layer.as_str()) {
            layers.push(&row.layer);
        }
    }
    layers
}
