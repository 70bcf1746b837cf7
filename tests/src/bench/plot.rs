//! Cost against scale, drawn as SVG.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Row;

/// What a plot shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Plot {
    /// Of the plugin's ADD.
    AddLatency,
    /// Of a packet, with more of what policy knows.
    PacketCost,
    /// From a pod's event to the kernel's map.
    PolicyChange,
    /// CPU from the cluster's objects to the kernel's maps.
    PolicyCold,
    /// Of the agent that ships logs.
    LogRate,
    /// Of the metric tick.
    Tick,
    /// Of the agent.
    Memory,
}

impl Plot {
    /// File name without ending, title, and what is across.
    const fn texts(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::AddLatency => ("add-latency", "CNI ADD against the size of the burst", "pods at once"),
            Self::PacketCost => ("packet-cost", "A denied packet against rules", "CIDRs or policies"),
            Self::PolicyChange => ("policy-change", "One pod's change, from event to map", "pods of the cluster"),
            Self::PolicyCold => ("policy-cold", "All policy of a node, from objects to maps", "pods of the cluster"),
            Self::LogRate => ("log-rate", "CPU of one core against log lines", "lines a second"),
            Self::Tick => ("metric-tick", "CPU of a metric tick against pods", "pods of two containers"),
            Self::Memory => ("memory", "Resident memory of the agent against pods", "pods of two containers"),
        }
    }
}

/// Where a row lies in a plot.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) plot: Plot,
    pub(super) series: String,
    pub(super) x: f64,
}

/// The points of one line, and those of the floors beside it.
#[derive(Default)]
struct Line {
    values: Vec<(f64, f64)>,
    floors: Vec<(f64, f64)>,
}

type Lines<'a> = BTreeMap<&'a str, Line>;

/// Each plot that has a line, by its file name without ending. A point alone is no line and is left out.
pub(super) fn plots<'a>(rows: impl Iterator<Item = &'a Row>) -> Vec<(&'static str, String)> {
    let mut found: BTreeMap<Plot, (&str, Lines<'_>)> = BTreeMap::new();
    for row in rows {
        if let Some(Point { plot, series, x }) = &row.point {
            let (unit, lines) = found.entry(*plot).or_default();
            *unit = row.unit;
            let line = lines.entry(series).or_default();
            line.values.push((*x, row.value));
            line.floors.extend(row.floor.map(|floor| (*x, floor)));
        }
    }
    let mut drawn = Vec::new();
    for (plot, (unit, mut lines)) in found {
        lines.retain(|_, line| line.values.len() > 1);
        if !lines.is_empty() {
            drawn.push((plot.texts().0, svg(plot, unit, lines)));
        }
    }
    drawn
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
/// Edges of the drawing.
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const RIGHT: f64 = 480.0;
const BOTTOM: f64 = 340.0;
const COLOURS: [&str; 8] = ["#0b6bcb", "#c41c1c", "#1f7a1f", "#9a5b13", "#6b2fb3", "#0f7f8c", "#b3306f", "#555e68"];

/// Where figures lie on the paper.
struct Scale {
    least: f64,
    most: f64,
    highest: f64,
    /// What spans two decades would be one heap at the left.
    logarithmic: bool,
}

impl Scale {
    fn of(lines: &Lines<'_>) -> Self {
        let points = || lines.values().flat_map(|line| line.values.iter().chain(&line.floors));
        let least = points().fold(f64::INFINITY, |least, (x, _)| least.min(*x));
        let most = points().fold(f64::MIN_POSITIVE, |most, (x, _)| most.max(*x));
        let highest = points().fold(f64::MIN_POSITIVE, |highest, (_, y)| highest.max(*y)) * 1.1;
        Self { least, most, highest, logarithmic: least > 0.0 && most / least >= 100.0 }
    }

    fn x(&self, x: f64) -> f64 {
        let share = if self.logarithmic { (x / self.least).ln() / (self.most / self.least).ln() } else { x / self.most };
        LEFT + share * (RIGHT - LEFT)
    }

    fn y(&self, y: f64) -> f64 {
        BOTTOM - y / self.highest * (BOTTOM - TOP)
    }

    fn polyline(&self, points: &[(f64, f64)], colour: &str, more: &str) -> String {
        let mut points = points.to_vec();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let places: Vec<String> = points.iter().map(|(x, y)| format!("{:.1},{:.1}", self.x(*x), self.y(*y))).collect();
        format!("<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{more} points=\"{}\"/>\n", places.join(" "))
    }
}

fn svg(plot: Plot, unit: &str, lines: Lines<'_>) -> String {
    let (_, title, across) = plot.texts();
    let scale = Scale::of(&lines);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    text(&mut out, (LEFT, 26.0), " font-size=\"16\"", title);
    text(&mut out, (8.0, TOP - 8.0), "", unit);
    for step in 0..=4 {
        let y = scale.highest * f64::from(step) / 4.0;
        let at = scale.y(y);
        // Writing to a String cannot fail.
        let _ = writeln!(out, "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{RIGHT}\" y2=\"{at:.1}\" stroke=\"#d8dde3\"/>");
        text(&mut out, (LEFT - 6.0, at + 4.0), " text-anchor=\"end\"", &short(y));
    }
    let mut marks: Vec<f64> = lines.values().flat_map(|line| &line.values).map(|(x, _)| *x).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for x in marks {
        text(&mut out, (scale.x(x), BOTTOM + 18.0), " text-anchor=\"middle\"", &short(x));
    }
    let across = format!("{across}{}", if scale.logarithmic { ", logarithmic" } else { "" });
    text(&mut out, (f64::midpoint(LEFT, RIGHT), BOTTOM + 40.0), " text-anchor=\"middle\"", &across);
    let floors = lines.values().any(|line| !line.floors.is_empty());
    let mut row = TOP;
    for ((name, line), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        out.push_str(&scale.polyline(&line.values, colour, ""));
        for (x, y) in &line.values {
            let _ = writeln!(out, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>", scale.x(*x), scale.y(*y));
        }
        if !line.floors.is_empty() {
            out.push_str(&scale.polyline(&line.floors, colour, " stroke-dasharray=\"4 4\" stroke-opacity=\"0.6\""));
        }
        text(&mut out, (RIGHT + 12.0, row), &format!(" fill=\"{colour}\""), name);
        row += 18.0;
    }
    if floors {
        text(&mut out, (RIGHT + 12.0, row), " fill=\"#555e68\"", "dashed: the floor of the same run");
    }
    out.push_str("</svg>\n");
    out
}

fn text(out: &mut String, (x, y): (f64, f64), more: &str, what: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\"{more}>{what}</text>");
}

/// A number of few letters.
fn short(value: f64) -> String {
    if value >= 100.0 || value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each opened element is closed, attributes are quoted, nothing else has a bracket: enough of XML to hold what is drawn here.
    fn elements(svg: &str) -> Vec<&str> {
        let (mut open, mut all) = (Vec::new(), Vec::new());
        for piece in svg.split('<').skip(1) {
            let (tag, after) = piece.split_once('>').unwrap_or_else(|| panic!("not closed: {piece}"));
            assert!(!after.contains('>'), "a bracket in the text: {after}");
            assert_eq!(tag.matches('"').count() % 2, 0, "an attribute without an end: {tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "closed out of order");
            } else {
                let name = tag.split([' ', '/']).next().unwrap_or_default();
                all.push(name);
                if !tag.ends_with('/') {
                    open.push(name);
                }
            }
        }
        assert_eq!(open, Vec::<&str>::new(), "never closed");
        all
    }

    fn rows() -> Vec<Row> {
        vec![
            Row::against("one", 2.0, "ns", 1.0).at(Plot::PacketCost, "v4 <in> & out", 60_000.0),
            Row::against("two", 4.0, "ns", 1.0).at(Plot::PacketCost, "v4 <in> & out", 1.0),
            Row::plain("alone", 9.0, "ns").at(Plot::PacketCost, "of one point", 3.0),
            Row::plain("alone", 7.0, "MiB").at(Plot::Memory, "of one point", 3.0),
            Row::plain("elsewhere", 7.0, "ms"),
        ]
    }

    #[test]
    fn a_plot_is_well_formed_and_has_every_point_of_a_line() {
        let rows = rows();
        let plots = plots(rows.iter());
        let [(name, svg)] = &plots[..] else { panic!("a point alone is no plot: {plots:?}") };
        let elements = elements(svg);
        let count = |wanted: &str| elements.iter().filter(|name| **name == wanted).count();
        assert_eq!((*name, count("svg"), count("circle"), count("polyline")), ("packet-cost", 1, 2, 2));
        assert!(svg.contains("v4 &lt;in&gt; &amp; out") && svg.contains("logarithmic") && svg.contains("dashed"), "{svg}");
        assert!(!svg.contains("of one point"), "{svg}");
    }

    #[test]
    fn the_highest_figure_is_below_the_top_and_the_lines_go_from_edge_to_edge() {
        let rows = rows();
        let (_, svg) = plots(rows.iter()).remove(0);
        // 4.0 of 4.4, at the smallest count; 2.0 at the largest.
        assert!(svg.contains("<circle cx=\"70.0\" cy=\"76.4\"") && svg.contains("<circle cx=\"480.0\" cy=\"208.2\""), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn a_scale_that_begins_at_nothing_is_linear() {
        let rows = [0.0, 50.0, 110.0].map(|pods| Row::plain("RSS", 20.0 + pods / 10.0, "MiB").at(Plot::Memory, "resident", pods));
        let (_, svg) = plots(rows.iter()).remove(0);
        assert_eq!(elements(&svg).iter().filter(|name| **name == "circle").count(), 3);
        assert!(svg.contains("cx=\"70.0\"") && svg.contains("cx=\"480.0\"") && !svg.contains("logarithmic"), "{svg}");
    }
}
