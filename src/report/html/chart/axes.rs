//! Curves and points between two axes, linear or logarithmic.

use std::ops::Range;

use plotters::{
    chart::ChartBuilder,
    coord::{
        combinators::{BindKeyPoints, LogCoord, WithKeyPoints},
        ranged1d::{AsRangedCoord, Ranged, ValueFormatter},
    },
    element::{Circle, DashedPathElement, PathElement, Text},
    prelude::IntoLogRange,
    style::{
        Color, ShapeStyle,
        text_anchor::{HPos, VPos},
    },
};

use super::{Area, Drawing, Entry, Ink, NARROW, TEXT, WIDE, draw, text, tick, width_of};
use crate::error::Result;

/// A plot.
#[derive(Debug, Clone)]
pub struct Plot {
    /// To the right.
    pub x: Axis,
    /// Up.
    pub y: Axis,
    /// What is drawn, from back to front.
    pub series: Vec<Series>,
}

/// An axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// Its quantity and unit.
    pub name: String,
    /// Its scale.
    pub scale: Scale,
}

/// A scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// From zero.
    Zero,
    /// From the smallest value.
    Linear,
    /// Logarithmic; values must be above zero.
    Log,
}

/// Points of one kind.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its name in the legend; empty for none.
    pub name: String,
    /// Its colour.
    pub ink: Ink,
    /// How it is drawn.
    pub marks: Marks,
    /// The points.
    pub points: Vec<(f64, f64)>,
    /// What stands beside each point where there is room; empty for nothing.
    pub labels: Vec<String>,
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// A line from point to point.
    Line,
    /// A thin line: what another line smooths.
    Thin,
    /// A dashed line: a bound, or a fit.
    Dashed,
    /// A dot at each point.
    Dots,
    /// A ring at each point.
    Rings,
}

impl Series {
    /// A series without the points that no axis has.
    pub fn new(
        name: &str,
        ink: Ink,
        marks: Marks,
        points: impl IntoIterator<Item = (f64, f64)>,
    ) -> Self {
        let points = points.into_iter().collect();
        Self { name: name.into(), ink, marks, points, labels: vec![] }
    }

    /// The same with a label for each point.
    pub fn labelled(self, labels: Vec<String>) -> Self {
        Self { labels, ..self }
    }
}

impl Plot {
    /// For a wide page and for a phone.
    ///
    /// # Errors
    /// None that drawing into memory gives.
    pub fn draw(&self) -> Result<(Drawing, Drawing)> {
        Ok((self.on(WIDE, 380)?, self.on(NARROW, 290)?))
    }

    /// Names of the series.
    pub fn legend(&self) -> Vec<Entry> {
        let named = self.series.iter().filter(|series| !series.name.is_empty());
        let entries = named.map(|series| Entry {
            name: series.name.clone(),
            ink: series.ink.css(),
            mark: match series.marks {
                Marks::Line | Marks::Thin => "line",
                Marks::Dashed => "dashed",
                Marks::Dots => "dot",
                Marks::Rings => "ring",
            },
        });
        entries.collect()
    }

    fn on(&self, width: u32, height: u32) -> Result<Drawing> {
        let x = self.range(&self.x, |point| point.0);
        let y = self.range(&self.y, |point| point.1);
        draw(width, height, |area| match (self.x.scale == Scale::Log, self.y.scale == Scale::Log) {
            (true, true) => self.paint(area, logarithmic(x), logarithmic(y)),
            (true, false) => self.paint(area, logarithmic(x), y),
            (false, true) => self.paint(area, x, logarithmic(y)),
            (false, false) => self.paint(area, x, y),
        })
    }

    /// From the least to the largest value, with some room, and never empty.
    fn range(&self, axis: &Axis, of: fn(&(f64, f64)) -> f64) -> Range<f64> {
        let values = self.series.iter().flat_map(|series| &series.points).map(of);
        // Beyond these bounds the room around them would be infinite, or nothing.
        let values =
            values.filter(|v| v.abs() < 1e300 && (axis.scale != Scale::Log || *v > 1e-300));
        let (least, most) =
            values.fold((f64::MAX, f64::MIN), |(least, most), v| (least.min(v), most.max(v)));
        let (least, most) = if least > most { (1.0, 2.0) } else { (least, most) };
        match axis.scale {
            Scale::Log => least / 1.6..most * 1.6,
            Scale::Zero if most > 0.0 => least.min(0.0)..most * 1.06,
            Scale::Zero => least.min(-1e-9) * 1.06..1e-9,
            Scale::Linear => {
                let room = 0.06 * (most - least).max(1e-3 * most.abs()).max(1e-9);
                least - room..most + room
            }
        }
    }

    fn paint<X, Y>(&self, area: &Area, x: X, y: Y) -> Result<()>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let (width, _) = area.dim_in_pixel();
        let narrow = width == NARROW;
        // The name of the upward axis stands above it, where it can be read without turning.
        area.draw_text(&self.y.name, &text(Ink::Faint, HPos::Left, VPos::Top), (0, 2))?;
        let mut chart = ChartBuilder::on(area)
            .margin_top(28)
            .margin_right(12)
            .x_label_area_size(48)
            .y_label_area_size(56)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(Ink::Rule.color().mix(0.0))
            .bold_line_style(Ink::Rule.color())
            .axis_style(Ink::Rule.color())
            .x_labels(if narrow { 4 } else { 8 })
            .y_labels(if narrow { 5 } else { 6 })
            .x_label_formatter(&|x| tick(*x))
            .y_label_formatter(&|y| tick(*y))
            .label_style(("sans-serif", TEXT, &Ink::Faint.color()))
            .x_desc(&self.x.name)
            .axis_desc_style(("sans-serif", TEXT, &Ink::Faint.color()))
            .draw()?;
        for series in &self.series {
            let (points, color) = (&series.points, series.ink.color());
            let line =
                |width| ShapeStyle { color: color.to_rgba(), filled: false, stroke_width: width };
            match series.marks {
                Marks::Line => {
                    chart.draw_series([PathElement::new(points.clone(), line(2))])?;
                }
                Marks::Thin => {
                    chart.draw_series([PathElement::new(points.clone(), line(1))])?;
                }
                Marks::Dashed => {
                    let dashes = DashedPathElement::new(points.clone(), 6, 5, line(2));
                    chart.draw_series([dashes])?;
                }
                Marks::Dots => {
                    chart.draw_series(points.iter().map(|p| Circle::new(*p, 4, color.filled())))?;
                }
                Marks::Rings => {
                    chart.draw_series(points.iter().map(|p| Circle::new(*p, 4, line(2))))?;
                }
            }
        }
        let named = self.series.iter().flat_map(|series| series.points.iter().zip(&series.labels));
        let named: Vec<_> = named.map(|(p, label)| (chart.backend_coord(p), &**label)).collect();
        for ((_, label), place) in named.iter().zip(spread(&named)) {
            let Some(place) = place else { continue };
            let style = text(Ink::Text, HPos::Left, VPos::Center);
            area.draw(&Text::new(*label, place, style))?;
        }
        Ok(())
    }
}

/// A logarithmic scale with marks at 1, 2 and 5 times each power of ten, or at powers alone where
/// these are many.
fn logarithmic(range: Range<f64>) -> WithKeyPoints<LogCoord<f64>> {
    let powers = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
    let steps: &[f64] = if powers.clone().count() > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let marks = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    let marks = marks.filter(|mark| range.contains(mark)).collect();
    range.clone().log_scale().with_key_points(marks)
}

/// Where the labels of `points` stand: right of each, else the first free place around it; none
/// where there is no room.
fn spread(points: &[((i32, i32), &str)]) -> Vec<Option<(i32, i32)>> {
    let mut taken: Vec<(i32, i32, i32)> = vec![];
    let mut places = vec![];
    for &((x, y), label) in points {
        let wide = width_of(label);
        let around = [(8, 0), (-wide - 8, 0), (-wide / 2, -13), (-wide / 2, 13), (8, -13), (8, 13)];
        let free = |&(left, line): &(i32, i32)| {
            let clear = |other: &(i32, i32, i32)| {
                (line - other.1).abs() > 14 || left > other.0 + other.2 || left + wide < other.0
            };
            let off = |((x, y), _): &((i32, i32), &str)| {
                (line - y).abs() > 9 || x + 5 < left || x - 5 > left + wide
            };
            taken.iter().all(clear) && points.iter().all(off)
        };
        let place = around.map(|(dx, dy)| (x + dx, y + dy)).into_iter().find(free);
        taken.extend(place.map(|(left, line)| (left, line, wide)));
        places.push(place);
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stand_apart_or_not_at_all() {
        assert_eq!(spread(&[((50, 50), "1"), ((90, 50), "2")]), [Some((58, 50)), Some((98, 50))]);
        // Twenty-four on one spot: some find a place, none lies on another.
        let crowd: Vec<_> = (0..24).map(|i| ((100 + i % 3, 100), "12")).collect();
        let places: Vec<_> = spread(&crowd).into_iter().flatten().collect();
        assert!((1..24).contains(&places.len()), "{places:?}");
        let wide = width_of("12");
        for (i, a) in places.iter().enumerate() {
            for b in &places[i + 1..] {
                assert!((a.1 - b.1).abs() > 14 || (a.0 - b.0).abs() > wide, "{a:?} {b:?}");
            }
        }
    }
}
