//! The picture of a run: the loss of each step, and that of the texts that are held out.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use sparse24::io::write_atomically;

use super::training::History;

const SIZE: (u32, u32) = (760, 420);

/// Steps whose mean is a point of the line: of single steps the texts decide more than the model.
const MEAN: usize = 20;

/// Writes the picture as SVG.
pub(super) fn write(history: &History, path: &Path) -> Result<()> {
    let mut svg = String::new();
    draw(history, &mut svg).map_err(|e| anyhow!("cannot draw the losses: {e}"))?;
    Ok(write_atomically(path, |file| file.write_all(svg.as_bytes()))?)
}

fn draw(history: &History, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let steps: Vec<(f64, f64)> = history
        .steps
        .chunks(MEAN)
        .map(|part| {
            let mean = part.iter().map(|step| step.loss).sum::<f64>() / part.len() as f64;
            (part.last().map_or(0.0, |step| step.number as f64), mean)
        })
        .collect();
    let held_out: Vec<(f64, f64)> = history.held_out.iter().map(|&(step, loss)| (step as f64, loss)).collect();
    let all = || steps.iter().chain(&held_out);
    let last = all().map(|point| point.0).fold(1.0, f64::max);
    let most = all().map(|point| point.1).fold(0.0, f64::max) * 1.05;
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, 0.0..most.max(f64::MIN_POSITIVE))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_desc("step")
        .y_desc("loss")
        .draw()?;
    let name = format!("trained on, mean of {MEAN} steps");
    chart
        .draw_series(LineSeries::new(steps, BLUE.stroke_width(2)))?
        .label(name)
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLUE.stroke_width(2)));
    chart.draw_series(LineSeries::new(held_out.iter().copied(), BLACK.stroke_width(1)))?;
    chart
        .draw_series(held_out.iter().map(|&point| Circle::new(point, 4, BLACK.filled())))?
        .label("held out")
        .legend(|(x, y)| Circle::new((x + 9, y), 4, BLACK.filled()));
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).border_style(BLACK.mix(0.3)).draw()?;
    area.present()?;
    Ok(())
}
