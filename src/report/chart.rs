//! The page's pictures: bars, lines and points as SVG, each drawn for a desk and for a phone.
//!
//! Invariant: a picture says nothing in colour alone, gives numbers with their unit, and carries an accessible name.
//! Colours are CSS variables with a light and a dark value (see [`style`]), so that one drawing serves both.

use std::fmt::Write as _;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;
use serde::Serialize;

use crate::error::{Error, Result};

/// Pixels of the two drawings.
const WIDE: u32 = 760;
const NARROW: u32 = 350;

/// The backend writes this over 1.24 as the font's size, which makes 13 pixels.
const FONT: u32 = 16;
const LINE: i32 = 20;
/// Width of a letter, about: the SVG backend knows no fonts.
const LETTER: i32 = 8;

/// What a mark stands for; its place in [`COLOURS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ink {
    /// 2:4 with this V's place in the format's list.
    Vector(usize),
    Dense,
    Masked,
    /// The parts of a forward pass: linear layers, attention, the rest.
    Part(usize),
    /// One of several lines that stand for nothing else.
    Series(usize),
}

impl Ink {
    /// Of an operation.
    pub(super) fn of(op: &str, vector: Option<usize>) -> Self {
        match (op, vector) {
            (_, Some(v)) => Self::Vector(v.max(1).ilog2() as usize),
            ("dense", None) => Self::Dense,
            _ => Self::Masked,
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Vector(at) => at.min(7),
            Self::Dense => 8,
            Self::Masked => 9,
            Self::Part(at) => [0, 5, 8][at.min(2)],
            Self::Series(at) => at % 8,
        }
    }

    /// A colour that stands for its variable until [`finish`] has replaced it.
    fn colour(self) -> RGBColor {
        let [r, g, b] = COLOURS[self.index()].0;
        RGBColor(r, g, b)
    }
}

/// On white, and on the page's dark ground: eight V, dense, masked. Neighbours differ in lightness, too.
const COLOURS: [([u8; 3], &str); 10] = [
    ([0x00, 0x5f, 0x9e], "#56b4e9"),
    ([0x3f, 0x8f, 0xc9], "#8fd0f5"),
    ([0x00, 0x78, 0x5a], "#2fc99a"),
    ([0x7d, 0x6a, 0x00], "#e5d34a"),
    ([0xa8, 0x4c, 0x84], "#dd93bd"),
    ([0xbf, 0x4a, 0x00], "#ff8a3d"),
    ([0x8f, 0x62, 0x00], "#f0b34d"),
    ([0x5b, 0x3f, 0xa0], "#b39df0"),
    ([0x6b, 0x6b, 0x6b], "#a8a8a8"),
    ([0x8b, 0x8b, 0x93], "#7d7d86"),
];

/// The style sheet of the colours, for a page or for a picture that stands alone.
pub(super) fn style() -> String {
    let mut light = String::new();
    let mut dark = String::new();
    for (at, ([r, g, b], on_dark)) in COLOURS.iter().enumerate() {
        let _ = write!(light, "--c{at}:#{r:02x}{g:02x}{b:02x};");
        let _ = write!(dark, "--c{at}:{on_dark};");
    }
    format!(
        ":root{{--ink:#1b1b1f;--ground:#fff;{light}}}\
         @media(prefers-color-scheme:dark){{:root{{--ink:#e6e6ea;--ground:#15161a;{dark}}}}}\
         @media print{{:root{{--ink:#000;--ground:#fff;{light}}}}}"
    )
}

/// A picture in both widths.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Chart {
    pub(super) id: String,
    pub(super) title: String,
    wide: String,
    narrow: String,
}

impl Chart {
    fn new(id: &str, title: &str, alt: &str, draw: impl Fn(u32) -> Result<String>) -> Result<Self> {
        let finished = |width| Ok::<_, Error>(finish(&draw(width)?, alt));
        Ok(Self { id: id.to_owned(), title: title.to_owned(), wide: finished(WIDE)?, narrow: finished(NARROW)? })
    }

    /// A file of its own.
    pub(super) fn standalone(&self) -> String {
        let style = format!("<style>{}svg{{color:var(--ink);background:var(--ground)}}</style>", style());
        match self.wide.split_once('>') {
            Some((open, rest)) => format!("{open}>{style}{rest}"),
            None => String::new(),
        }
    }
}

/// Gives a drawing its accessible name and the page's colours.
fn finish(svg: &str, alt: &str) -> String {
    let alt = alt.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
    // XML has no control characters, and names of devices may.
    let [alt, svg] = [&alt, svg].map(|text| text.replace(|c: char| c.is_control() && c != '\n', " "));
    let mut svg = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{alt}\" "), 1);
    svg = svg.replace("\"#000000\"", "\"currentColor\"");
    for (at, ([r, g, b], _)) in COLOURS.iter().enumerate() {
        svg = svg.replace(&format!("\"#{r:02X}{g:02X}{b:02X}\""), &format!("\"var(--c{at})\""));
    }
    svg
}

/// A horizontal bar, or several one behind the other.
pub(super) struct Bar {
    pub(super) label: String,
    /// Lengths and what they stand for.
    pub(super) parts: Vec<(f64, Ink)>,
    /// Where the middle half of the samples lies.
    pub(super) spread: Option<(f64, f64)>,
    /// Written behind the bar.
    pub(super) text: String,
}

/// Bars in groups, each under a heading.
pub(super) struct Bars {
    pub(super) unit: String,
    pub(super) groups: Vec<(String, Vec<Bar>)>,
    /// Vertical lines, and what they mark.
    pub(super) marks: Vec<(f64, String)>,
    pub(super) legend: Vec<(Ink, String)>,
}

impl Bars {
    pub(super) fn chart(&self, id: &str, title: &str, alt: &str) -> Result<Chart> {
        Chart::new(id, title, alt, |width| drawn(|svg| self.draw(svg, width)))
    }

    fn draw(&self, svg: &mut String, width: u32) -> Drawn {
        let top = legend_height(&self.legend, width) + LINE * self.marks.len() as i32;
        let bars = || self.groups.iter().flat_map(|(_, bars)| bars);
        let height: i32 = self.groups.iter().map(|(_, bars)| LINE * (1 + bars.len() as i32) + 6).sum();
        let total = top + height + 56;
        let area = SVGBackend::with_string(svg, (width, total as u32)).into_drawing_area();
        legend(&area, &self.legend, width)?;

        let left = bars().map(|b| letters(&b.label)).max().unwrap_or(0).min(width as i32 / 3) + 14;
        let right = bars().map(|b| letters(&b.text)).max().unwrap_or(0) + 16;
        let length = |b: &Bar| b.parts.iter().map(|p| p.0).sum::<f64>().max(b.spread.map_or(0.0, |s| s.1));
        let longest = bars().map(length).chain(self.marks.iter().map(|m| m.0)).fold(0.0, f64::max) * 1.02;
        let mut chart = ChartBuilder::on(&area)
            .margin_top(top)
            .margin_right(right)
            .set_label_area_size(LabelAreaPosition::Left, left)
            .set_label_area_size(LabelAreaPosition::Bottom, 46)
            .build_cartesian_2d(0.0..longest, f64::from(height)..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .x_labels(if width == NARROW { 4 } else { 8 })
            .x_label_formatter(&|x| tick(*x))
            .x_desc(self.unit.as_str())
            .label_style(font())
            .axis_style(BLACK.mix(0.5))
            .draw()?;
        let plot = chart.plotting_area();
        let at = |x: f64, y: i32| plot.map_coordinate(&(x, f64::from(y)));
        let start = at(0.0, 0).0;
        let mut y = 0;
        for (heading, bars) in &self.groups {
            let heading = fitted(heading, width as i32 - 8);
            area.draw(&Text::new(heading, (4, at(0.0, y).1 + 4), font().style(FontStyle::Bold)))?;
            y += LINE;
            for bar in bars {
                let (_, line) = at(0.0, y);
                area.draw(&Text::new(fitted(&bar.label, left - 10), (8, line + 3), font()))?;
                let mut from = 0.0;
                for (length, ink) in &bar.parts {
                    let (x0, x1) = (at(from, 0).0, at(from + length, 0).0.max(at(from, 0).0 + 1));
                    area.draw(&Rectangle::new([(x0, line + 3), (x1, line + LINE - 3)], ink.colour().filled()))?;
                    from += length;
                }
                let mut end = at(from, 0).0;
                if let Some((low, high)) = bar.spread {
                    let (x0, x1, middle) = (at(low, 0).0, at(high, 0).0, line + LINE / 2);
                    area.draw(&PathElement::new([(x0, middle), (x1, middle)], BLACK.stroke_width(2)))?;
                    end = end.max(x1);
                }
                area.draw(&Text::new(bar.text.clone(), (end + 5, line + 3), font()))?;
                y += LINE;
            }
            y += 6;
        }
        let bottom = at(0.0, height).1;
        area.draw(&PathElement::new([(start, at(0.0, 0).1), (start, bottom)], BLACK.mix(0.5)))?;
        for (row, (x, what)) in self.marks.iter().enumerate() {
            let (x, y) = (at(*x, 0).0, top - LINE * (self.marks.len() - row) as i32);
            let dashes = (y + 4..bottom).step_by(8).map(|y| PathElement::new([(x, y), (x, y + 4)], BLACK.mix(0.7)));
            dashes.into_iter().try_for_each(|dash| area.draw(&dash))?;
            let room = letters(what) + 8;
            let x = if x + room < width as i32 { x + 5 } else { (x - room).max(2) };
            area.draw(&Text::new(fitted(what, width as i32 - 8), (x, y), font()))?;
        }
        area.present()?;
        Ok(())
    }
}

/// Lines or points over two axes.
pub(super) struct Plot {
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
    /// Straight or broken lines without points, such as ceilings, and what they are.
    pub(super) roofs: Vec<(Vec<(f64, f64)>, String)>,
}

pub(super) struct Axis {
    pub(super) name: String,
    /// Logarithmic, else from zero.
    pub(super) log: bool,
}

pub(super) struct Series {
    pub(super) ink: Ink,
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    /// Joined by a line.
    pub(super) joined: bool,
}

impl Plot {
    pub(super) fn chart(&self, id: &str, title: &str, alt: &str) -> Result<Chart> {
        Chart::new(id, title, alt, |width| drawn(|svg| self.draw(svg, width)))
    }

    fn draw(&self, svg: &mut String, width: u32) -> Drawn {
        let names: Vec<_> = self.series.iter().map(|s| (s.ink, s.name.clone())).collect();
        let top = legend_height(&names, width) + LINE * self.roofs.len() as i32;
        let area = SVGBackend::with_string(svg, (width, 330 + top as u32)).into_drawing_area();
        legend(&area, &names, width)?;
        for (at, (_, what)) in self.roofs.iter().enumerate() {
            let y = top - LINE * (self.roofs.len() - at) as i32;
            area.draw(&Text::new(fitted(&format!("- - {what}"), width as i32 - 8), (8, y), font()))?;
        }
        let points = || self.series.iter().flat_map(|s| &s.points).chain(self.roofs.iter().flat_map(|(line, _)| line));
        let range = |of: fn(&(f64, f64)) -> f64, log: bool| {
            let (low, high) = points().map(of).fold((f64::INFINITY, 0f64), |(l, h), v| (l.min(v), h.max(v)));
            if log { low * 0.8..high * 1.25 } else { 0.0..high * 1.08 }
        };
        let (xs, ys) = (range(|p| p.0, self.x.log), range(|p| p.1, self.y.log));
        let mut builder = ChartBuilder::on(&area);
        builder
            .margin_top(top + 6)
            .margin_left(10)
            .margin_right(16)
            .set_label_area_size(LabelAreaPosition::Left, 62)
            .set_label_area_size(LabelAreaPosition::Bottom, 46);
        match (self.x.log, self.y.log) {
            (true, true) => self.plot(&mut builder.build_cartesian_2d(xs.log_scale(), ys.log_scale())?, width)?,
            (true, false) => self.plot(&mut builder.build_cartesian_2d(xs.log_scale(), ys)?, width)?,
            (false, true) => self.plot(&mut builder.build_cartesian_2d(xs, ys.log_scale())?, width)?,
            (false, false) => self.plot(&mut builder.build_cartesian_2d(xs, ys)?, width)?,
        }
        area.present()?;
        Ok(())
    }

    fn plot<X, Y>(&self, chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>, width: u32) -> Drawn
    where
        X: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .x_labels(if width == NARROW { 5 } else { 9 })
            .y_labels(7)
            .x_label_formatter(&|x| tick(*x))
            .y_label_formatter(&|y| tick(*y))
            .x_desc(self.x.name.as_str())
            .y_desc(self.y.name.as_str())
            .label_style(font())
            .axis_style(BLACK.mix(0.5))
            .draw()?;
        for (line, _) in &self.roofs {
            chart.draw_series(DashedLineSeries::new(line.iter().copied(), 6, 4, BLACK.mix(0.7).into()))?;
        }
        for series in &self.series {
            let colour = series.ink.colour();
            if series.joined {
                chart.draw_series(LineSeries::new(series.points.iter().copied(), colour.stroke_width(2)))?;
            }
            chart.draw_series(series.points.iter().map(|p| Circle::new(*p, 4, colour.filled())))?;
        }
        Ok(())
    }
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn drawn(draw: impl Fn(&mut String) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg).map_err(|e| Error::invalid(format!("cannot draw a chart: {e}")))?;
    Ok(svg)
}

fn font() -> FontDesc<'static> {
    ("sans-serif", FONT).into_font()
}

/// A tick without idle digits.
fn tick(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        a if !(1e-3..1e5).contains(&a) => format!("{x:.0e}"),
        _ => {
            let text = format!("{x:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
    }
}

fn letters(text: &str) -> i32 {
    LETTER * text.chars().count() as i32
}

/// As much of a text as `room` pixels take.
fn fitted(text: &str, room: i32) -> String {
    let most = (room / LETTER).max(4) as usize;
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// Where each entry of a legend stands, line by line.
fn legend_places(entries: &[(Ink, String)], width: u32) -> Vec<(i32, i32)> {
    let (mut x, mut y) = (4, 4);
    let place = |(_, name): &(Ink, String)| {
        let room = letters(name) + 28;
        if x > 4 && x + room > width as i32 {
            (x, y) = (4, y + LINE);
        }
        let at = (x, y);
        x += room;
        at
    };
    entries.iter().map(place).collect()
}

fn legend_height(entries: &[(Ink, String)], width: u32) -> i32 {
    legend_places(entries, width).last().map_or(4, |(_, y)| y + LINE + 4)
}

fn legend(area: &DrawingArea<SVGBackend<'_>, Shift>, entries: &[(Ink, String)], width: u32) -> Drawn {
    for ((ink, name), (x, y)) in entries.iter().zip(legend_places(entries, width)) {
        area.draw(&Rectangle::new([(x, y + 2), (x + 11, y + 13)], ink.colour().filled()))?;
        area.draw(&Text::new(fitted(name, width as i32 - 24), (x + 16, y), font()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_files_is_escaped_and_colours_become_variables() -> Result<()> {
        let bar = |ink| Bar {
            label: "<script>alert(1)</script>".into(),
            parts: vec![(1.5, ink)],
            spread: Some((1.4, 1.6)),
            text: "1.50x".into(),
        };
        let inks = (0..8).map(Ink::Vector).chain([Ink::Dense, Ink::Masked]);
        let bars = Bars {
            unit: "x & y".into(),
            groups: vec![("a <b> & \"c\"".into(), inks.clone().map(bar).collect())],
            marks: vec![(2.0, "<mark>".into())],
            legend: vec![(Ink::Dense, "</svg>".into())],
        };
        let chart = bars.chart("id", "title", "name \"<&")?;
        for svg in [&chart.wide, &chart.narrow] {
            assert!(!svg.contains("<script") && !svg.contains("<b>") && !svg.contains("<mark>"), "{svg}");
            assert_eq!(svg.matches("</svg>").count(), 1);
            assert!(svg.contains(r#"role="img" aria-label="name &quot;&lt;&amp;""#));
            for ink in inks.clone() {
                assert!(svg.contains(&format!("var(--c{})", ink.index())), "{ink:?}");
            }
            assert!(!svg.contains("\"#"), "a colour that is not the page's: {svg}");
        }
        Ok(())
    }

    #[test]
    fn ticks_and_texts_are_cut_to_what_they_need() {
        assert_eq!([0.0, 0.5, 1.0, 128.0, 0.0625].map(tick), ["0", "0.5", "1", "128", "0.0625"]);
        assert_eq!((tick(1e-5), tick(1e6)), ("1e-5".into(), "1e6".into()));
        assert_eq!(fitted("abcdefgh", 5 * LETTER), "abcd…");
        assert_eq!(fitted("abcde", 5 * LETTER), "abcde");
    }
}
