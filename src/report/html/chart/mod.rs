//! Charts as SVG, drawn by plotters twice: for a wide page and for a phone. Colours are the page's
//! CSS variables, so that a chart follows light, dark and print; text is the page's font.

mod axes;
mod bars;

pub use axes::{Axis, Marks, Plot, Scale, Series};
pub use bars::{Bar, Bars};

use plotters::{
    coord::Shift,
    prelude::{DrawingArea, IntoDrawingArea, SVGBackend},
    style::{
        Color, RGBColor, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};
use serde::Serialize;

use crate::error::Result;

/// A chart with the words around it.
#[derive(Debug, Serialize)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// In which units.
    pub units: String,
    /// What it says, for those who do not see it.
    pub description: String,
    /// Names of the colours, where there are several.
    pub legend: Vec<Entry>,
    /// For a wide page.
    pub wide: Drawing,
    /// For a phone.
    pub narrow: Drawing,
}

impl Chart {
    /// Bars, with names for their colours.
    ///
    /// # Errors
    /// As [`Bars::draw`].
    pub fn bars(words: Words, legend: Vec<Entry>, bars: &Bars) -> Result<Self> {
        Ok(Self::new(words, legend, bars.draw()?))
    }

    /// Curves and points.
    ///
    /// # Errors
    /// As [`Plot::draw`].
    pub fn plot(words: Words, plot: &Plot) -> Result<Self> {
        let legend = plot.legend();
        // One series is what the title says.
        let legend = if legend.len() > 1 { legend } else { vec![] };
        Ok(Self::new(words, legend, plot.draw()?))
    }

    fn new(words: Words, legend: Vec<Entry>, (wide, narrow): (Drawing, Drawing)) -> Self {
        let Words { title, units, description } = words;
        Self { title, units, description, legend, wide, narrow }
    }
}

/// The words around a chart.
#[derive(Debug)]
pub struct Words {
    /// See [`Chart`].
    pub title: String,
    /// See [`Chart`].
    pub units: String,
    /// See [`Chart`].
    pub description: String,
}

impl Words {
    /// Title, units and description.
    pub fn new(title: &str, units: &str, description: impl Into<String>) -> Self {
        Self { title: title.into(), units: units.into(), description: description.into() }
    }
}

/// An entry of a legend.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Name of the series.
    pub name: String,
    /// Its colour, in CSS.
    pub ink: String,
    /// `area`, `line`, `dashed`, `dot` or `ring`.
    pub mark: &'static str,
}

impl Entry {
    /// The colour of an area.
    pub fn area(name: impl Into<String>, ink: Ink) -> Self {
        Self { name: name.into(), ink: ink.css(), mark: "area" }
    }
}

/// The inside of an `<svg>`.
#[derive(Debug, Serialize)]
pub struct Drawing {
    /// Width of its view box.
    pub width: u32,
    /// Height of its view box.
    pub height: u32,
    /// Its elements.
    pub body: String,
}

/// Width for a wide page.
pub const WIDE: u32 = 880;
/// Width for a phone.
pub const NARROW: u32 = 350;

/// A colour by its role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    /// Figures and names.
    Text,
    /// Names of axes.
    Faint,
    /// Grid lines.
    Rule,
    /// One of eight, told apart by colour-blind readers too.
    Series(u8),
    /// The same, paler: what lies behind it.
    Pale(u8),
}

impl Ink {
    /// Its value in CSS.
    pub fn css(self) -> String {
        match self {
            Self::Text => "var(--ink)".into(),
            Self::Faint => "var(--faint)".into(),
            Self::Rule => "var(--rule)".into(),
            Self::Series(n) => format!("var(--series-{})", n % 8 + 1),
            Self::Pale(n) => format!("var(--pale-{})", n % 8 + 1),
        }
    }

    /// What stands for it while plotters draws.
    fn color(self) -> RGBColor {
        let code = match self {
            Self::Text => 0,
            Self::Faint => 1,
            Self::Rule => 2,
            Self::Series(n) => 0x10 + n % 8,
            Self::Pale(n) => 0x20 + n % 8,
        };
        RGBColor(0xc0, 0xde, code)
    }

    fn all() -> impl Iterator<Item = Self> {
        let series = (0..8).flat_map(|n| [Self::Series(n), Self::Pale(n)]);
        [Self::Text, Self::Faint, Self::Rule].into_iter().chain(series)
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws on an empty canvas.
fn draw(width: u32, height: u32, paint: impl FnOnce(&Area) -> Result<()>) -> Result<Drawing> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        paint(&area)?;
        area.present()?;
    }
    // The page writes the outer element, which needs a role and a title.
    let inside = svg.split_once('>').map_or("", |(_, inside)| inside);
    let mut body = inside.trim_end().trim_end_matches("</svg>").to_string();
    for ink in Ink::all() {
        let RGBColor(r, g, b) = ink.color();
        body = body.replace(&format!("\"#{r:02X}{g:02X}{b:02X}\""), &format!("\"{}\"", ink.css()));
    }
    for default in [" opacity=\"1\"", " font-family=\"sans-serif\"", " stroke=\"none\""] {
        body = body.replace(default, "");
    }
    Ok(Drawing { width, height, body })
}

/// Size of text, in pixels of the view box. The SVG backend divides sizes by 1.24.
const TEXT: f64 = 12.5 * 1.24;

/// About how wide `text` is, in pixels of the view box.
fn width_of(text: &str) -> i32 {
    (7.3 * text.chars().count() as f64).ceil() as i32
}

fn text(ink: Ink, h: HPos, v: VPos) -> TextStyle<'static> {
    let color = ink.color().to_backend_color();
    TextStyle { font: ("sans-serif", TEXT).into(), color, pos: Pos::new(h, v) }
}

/// A figure at an axis: as few digits as tell it from its neighbours.
pub fn tick(x: f64) -> String {
    let text = match x.abs() {
        small if small < 1000.0 => format!("{x:.4}"),
        _ => crate::report::human(x.abs()),
    };
    let (figure, prefix) = text.split_once(' ').unwrap_or((&text, ""));
    let short = match figure.contains('.') {
        true => figure.trim_end_matches('0').trim_end_matches('.'),
        false => figure,
    };
    let sign = if x <= -1000.0 { "−" } else { "" };
    let space = if prefix.is_empty() { "" } else { " " };
    format!("{sign}{short}{space}{prefix}").replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_short() {
        let cases = [(0.0, "0"), (0.5, "0.5"), (20.0, "20"), (1e3, "1 k"), (2.5e12, "2.5 T")];
        for (x, text) in cases {
            assert_eq!(tick(x), text);
        }
        assert_eq!(tick(-2.5e12), "−2.5 T");
        assert_eq!(tick(-0.25), "−0.25");
    }

    #[test]
    fn no_colour_is_fixed() {
        let all: Vec<Ink> = Ink::all().collect();
        let drawing = draw(100, 50, |area| {
            for (i, ink) in all.iter().enumerate() {
                area.draw_text("<&>", &text(*ink, HPos::Left, VPos::Top), (i as i32, 0))?;
            }
            Ok(())
        })
        .unwrap();
        assert!(!drawing.body.contains('#'), "{}", drawing.body);
        assert_eq!(drawing.body.matches("fill=\"var(--").count(), all.len());
        assert!(drawing.body.contains("&lt;&amp;&gt;"));
        assert!(!drawing.body.contains("<svg"));
    }
}
