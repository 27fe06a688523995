//! Horizontal bars: parts of a whole, or the steps of a waterfall.

use plotters::{
    prelude::{PathElement, Rectangle},
    style::{
        Color,
        text_anchor::{HPos, VPos},
    },
};

use super::{Area, Drawing, Ink, NARROW, WIDE, draw, text, width_of};
use crate::error::Result;

/// A bar with its name and its figure.
#[derive(Debug, Clone)]
pub struct Bar {
    /// Its name.
    pub name: String,
    /// Its figure, for people.
    pub value: String,
    /// From where to where, in which colour.
    pub spans: Vec<(f64, f64, Ink)>,
}

impl Bar {
    /// A bar from zero, made of `parts` end to end.
    pub fn stacked(
        name: impl Into<String>,
        value: impl Into<String>,
        parts: impl IntoIterator<Item = (f64, Ink)>,
    ) -> Self {
        let mut end = 0.0;
        let spans = parts.into_iter().map(|(length, ink)| {
            let start = end;
            end += length;
            (start, end, ink)
        });
        Self { name: name.into(), value: value.into(), spans: spans.collect() }
    }
}

/// Bars over one another, on one scale that holds zero.
#[derive(Debug, Clone, Default)]
pub struct Bars {
    /// The bars, from top to bottom.
    pub bars: Vec<Bar>,
    /// Whether each begins where the one above it ends.
    pub linked: bool,
}

/// Pixels of a bar.
const THICK: i32 = 18;

impl Bars {
    /// For a wide page, with the names before the bars; and for a phone, with the names above.
    ///
    /// # Errors
    /// None that drawing into memory gives.
    pub fn draw(&self) -> Result<(Drawing, Drawing)> {
        let widest = |text: fn(&Bar) -> &str| {
            self.bars.iter().map(|bar| width_of(text(bar))).max().unwrap_or(0)
        };
        let names = widest(|bar| &bar.name).min(WIDE as i32 * 2 / 5) + 14;
        let values = widest(|bar| &bar.value) + 12;
        let wide =
            Place { left: names, right: WIDE as i32 - values, row: 30, bar: 5, above: false };
        let narrow = Place { left: 0, right: NARROW as i32, row: 48, bar: 22, above: true };
        Ok((self.on(WIDE, &wide)?, self.on(NARROW, &narrow)?))
    }

    fn on(&self, width: u32, place: &Place) -> Result<Drawing> {
        let height = place.row * self.bars.len() as i32;
        draw(width, height.max(1) as u32, |area| {
            for (i, bar) in self.bars.iter().enumerate() {
                self.bar(area, place, i as i32 * place.row, bar)?;
            }
            // Names above the bars leave no room for them.
            if self.linked && !place.above { self.links(area, place) } else { Ok(()) }
        })
    }

    fn bar(&self, area: &Area, place: &Place, top: i32, bar: &Bar) -> Result<()> {
        let (left, v) = (place.left, if place.above { VPos::Top } else { VPos::Center });
        let line = top + if place.above { 4 } else { place.row / 2 };
        let name = text(Ink::Text, if place.above { HPos::Left } else { HPos::Right }, v);
        let value = text(Ink::Faint, if place.above { HPos::Right } else { HPos::Left }, v);
        let at = if place.above { 0 } else { left - 10 };
        area.draw_text(&fitting(&bar.name, place, &bar.value), &name, (at, line))?;
        let at = if place.above { place.right } else { place.right + 8 };
        area.draw_text(&bar.value, &value, (at, line))?;
        let zero = self.x(place, 0.0);
        let rule = Ink::Rule.color();
        let (from, to) = match place.above {
            true => (top + place.bar, top + place.bar + THICK),
            false => (top, top + place.row),
        };
        area.draw(&PathElement::new(vec![(zero, from), (zero, to)], rule))?;
        for &(from, to, ink) in bar.spans.iter().filter(|(from, to, _)| from != to) {
            let (mut x0, mut x1) = (self.x(place, from.min(to)), self.x(place, from.max(to)));
            // Parts are told apart by a gap; the smallest still shows.
            if x1 - x0 > 4 {
                x1 -= 1;
            }
            if x1 - x0 < 2 {
                x1 = (x0 + 2).min(place.right);
                x0 = x1 - 2;
            }
            let corners = [(x0, top + place.bar), (x1, top + place.bar + THICK)];
            area.draw(&Rectangle::new(corners, ink.color().filled()))?;
        }
        Ok(())
    }

    fn links(&self, area: &Area, place: &Place) -> Result<()> {
        let rows = self.bars.windows(2).enumerate();
        for (i, pair) in rows {
            let Some(&(_, end, _)) = pair[0].spans.last() else { continue };
            let x = self.x(place, end);
            let top = i as i32 * place.row + place.bar + THICK;
            let bottom = (i as i32 + 1) * place.row + place.bar;
            area.draw(&PathElement::new(vec![(x, top), (x, bottom)], Ink::Faint.color()))?;
        }
        Ok(())
    }

    /// Where `value` lies.
    fn x(&self, place: &Place, value: f64) -> i32 {
        let ends = self.bars.iter().flat_map(|bar| &bar.spans).flat_map(|span| [span.0, span.1]);
        let (least, most) = ends.fold((0.0f64, 0.0f64), |(a, b), x| (a.min(x), b.max(x)));
        let part = if most > least { (value - least) / (most - least) } else { 0.0 };
        place.left + (part * f64::from(place.right - place.left)).round() as i32
    }
}

/// Where things lie on a canvas.
struct Place {
    left: i32,
    right: i32,
    row: i32,
    /// Of the bar, from the top of its row.
    bar: i32,
    /// Whether names stand above their bars.
    above: bool,
}

/// `name`, cut to the room that it has.
fn fitting(name: &str, place: &Place, value: &str) -> String {
    let room = if place.above { place.right - width_of(value) - 10 } else { place.left - 10 };
    if width_of(name) <= room {
        return name.into();
    }
    let most = (f64::from(room.max(0)) / 7.3) as usize;
    name.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}
