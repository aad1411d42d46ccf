//! The plot: of one point the distributions of its times, of a sweep times and throughput over the load.
//!
//! By `plotters` with its SVG backend alone, which is text and needs no font or drawing library.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::{Point, summary::Times};

const SIZE: (u32, u32) = (960, 720);
/// Milliseconds below which nothing is told apart.
const SMALLEST_MS: f64 = 0.01;

type Drawn = Result<(), Box<dyn Error>>;

/// Writes the plot of these points.
///
/// # Errors
/// A file that cannot be written.
pub fn write(path: &Path, title: &str, points: &[Point]) -> Drawn {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(title, ("sans-serif", 20))?;
    match points {
        [point] => distributions(&root, point)?,
        points => sweep(&root, points)?,
    }
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// A curve and what it is called.
struct Curve {
    name: &'static str,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

/// Share of requests (or gaps) over time.
fn distributions(area: &Area<'_>, point: &Point) -> Drawn {
    let good = || point.requests.iter().filter(|record| record.error.is_none());
    let curves = [
        cumulative("time to first token", BLUE, good().filter_map(|record| record.ttft_s).collect()),
        cumulative("between tokens", RED, good().flat_map(|record| record.gaps_s.clone()).collect()),
        cumulative("whole request", BLACK, good().map(|record| record.e2e_s).collect()),
    ];
    chart(area, &curves, "ms", "share at most so long", Scale::Times)
}

fn cumulative(name: &'static str, color: RGBColor, mut seconds: Vec<f64>) -> Curve {
    seconds.sort_by(f64::total_cmp);
    let count = seconds.len() as f64;
    // A few hundred points show all there is to see.
    let step = (seconds.len() / 500).max(1);
    let last = seconds.len().saturating_sub(1);
    let shown = seconds.iter().enumerate().filter(|(index, _)| index % step == 0 || *index == last);
    let points = shown.map(|(index, value)| ((value * 1e3).max(SMALLEST_MS), (index + 1) as f64 / count)).collect();
    Curve { name, color, points }
}

/// Times over the load above, throughput below.
fn sweep(area: &Area<'_>, points: &[Point]) -> Drawn {
    let (upper, lower) = area.split_vertically((60).percent_height());
    let over = |name, color, value: fn(&Point) -> Option<f64>| {
        let points = points.iter().filter_map(|point| Some((point.load.value(), value(point)?.max(SMALLEST_MS)))).collect();
        Curve { name, color, points }
    };
    let times = [
        over("first token, median", BLUE, |point| time(&point.summary.ttft_ms, |times| times.p50)),
        over("first token, 99 %", CYAN, |point| time(&point.summary.ttft_ms, |times| times.p99)),
        over("between tokens, median", RED, |point| time(&point.summary.itl_ms, |times| times.p50)),
        over("between tokens, 99 %", MAGENTA, |point| time(&point.summary.itl_ms, |times| times.p99)),
    ];
    chart(&upper, &times, "load", "ms", Scale::TimesOverLoad)?;
    let throughput = [over("answer tokens per s", BLACK, |point| Some(point.summary.output_tokens_per_s))];
    chart(&lower, &throughput, "load (requests at once, or per s)", "tokens/s", Scale::Plain)
}

fn time(times: &Option<Times>, value: fn(&Times) -> f64) -> Option<f64> {
    times.as_ref().map(value)
}

/// Which axis is logarithmic.
enum Scale {
    Times,
    TimesOverLoad,
    Plain,
}

/// Pixels at the right that are the legend's alone, so that it covers no curve.
const LEGEND_WIDTH: u32 = 200;

fn chart(area: &Area<'_>, curves: &[Curve], x_name: &str, y_name: &str, scale: Scale) -> Drawn {
    let (width, _) = area.dim_in_pixel();
    let (area, beside) = area.split_horizontally(width - LEGEND_WIDTH);
    legend(&beside, curves)?;
    let all = || curves.iter().flat_map(|curve| curve.points.iter().copied());
    let (low_x, high_x) = bounds(all().map(|point| point.0));
    let (low_y, high_y) = bounds(all().map(|point| point.1));
    let mut builder = ChartBuilder::on(&area);
    builder.margin(12).x_label_area_size(40).y_label_area_size(64);
    // The three differ in the type of their axes.
    macro_rules! draw {
        ($x:expr, $y:expr) => {{
            let mut chart = builder.build_cartesian_2d($x, $y)?;
            chart.configure_mesh().x_desc(x_name).y_desc(y_name).draw()?;
            for curve in curves {
                chart.draw_series(LineSeries::new(curve.points.iter().copied(), curve.color.stroke_width(2)))?;
            }
        }};
    }
    match scale {
        Scale::Times => draw!((low_x..high_x).log_scale(), 0.0..1.0),
        Scale::TimesOverLoad => draw!(low_x..high_x, (low_y..high_y).log_scale()),
        Scale::Plain => draw!(low_x..high_x, 0.0..high_y),
    }
    Ok(())
}

/// The curves' names, each beside a piece of its line.
fn legend(area: &Area<'_>, curves: &[Curve]) -> Drawn {
    const LINE_HEIGHT: i32 = 20;
    for (curve, y) in curves.iter().zip((1..).map(|line| line * LINE_HEIGHT)) {
        area.draw(&PathElement::new([(4, y), (24, y)], curve.color.stroke_width(2)))?;
        area.draw(&Text::new(curve.name, (30, y - 6), ("sans-serif", 13)))?;
    }
    Ok(())
}

/// Least and largest, never equal, so that an axis has a length.
fn bounds(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    if !low.is_finite() || !high.is_finite() {
        (1.0, 2.0)
    } else if low == high {
        (low * 0.9, high * 1.1 + 1e-9)
    } else {
        (low, high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number that follows `key="` in a text.
    fn numbers(text: &str, key: &str) -> Vec<f64> {
        text.split(&format!("{key}=\"")).skip(1).filter_map(|rest| rest.split(['"', ',', ' ']).next()?.parse().ok()).collect()
    }

    #[test]
    fn the_legend_lies_beside_the_curves() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("plot.svg");
        let curves = [
            Curve { name: "first curve", color: BLUE, points: vec![(1.0, 0.1), (10.0, 1.0)] },
            Curve { name: "second curve", color: RED, points: vec![(2.0, 0.1), (9.0, 1.0)] },
        ];
        {
            let root = SVGBackend::new(&path, SIZE).into_drawing_area();
            chart(&root, &curves, "ms", "share", Scale::Times).expect("draws");
            root.present().expect("writes");
        }
        let svg = std::fs::read_to_string(&path).expect("written");
        let border = f64::from(SIZE.0 - LEGEND_WIDTH);
        let named = |name: &str| {
            let (before, _) = svg.split_once(name).expect("in the legend");
            let (_, element) = before.rsplit_once("<text").expect("a text");
            numbers(element, " x")[0]
        };
        assert!(curves.iter().all(|curve| named(curve.name) > border));
        let lines: Vec<&str> = svg.split("<polyline").skip(1).collect();
        let ends: Vec<f64> = lines.iter().flat_map(|line| numbers(&line[..line.find('>').unwrap_or(0)], "points")).collect();
        let beside = ends.iter().filter(|x| **x > border).count();
        assert_eq!(beside, curves.len(), "only the legend's own pieces of line: {ends:?}");
    }
}
