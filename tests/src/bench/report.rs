//! A run of benches as tables and plots, and held against an earlier run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use super::{Row, plot};

/// The rows of each bench, in the order of the run.
pub type Benches = Vec<(String, Vec<Row>)>;

/// Writes `bench.md`, `bench.json` and the plots.
///
/// # Errors
/// When a file cannot be written.
pub fn write(directory: &Path, benches: &Benches) -> anyhow::Result<()> {
    let put = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let plots = plot::plots(benches.iter().flat_map(|(_, rows)| rows));
    let names: Vec<&str> = plots.iter().map(|(name, _)| *name).collect();
    put("bench.md", &markdown(benches, &names))?;
    put("bench.json", &format!("{:#}\n", json(benches)))?;
    for (name, svg) in &plots {
        put(&format!("{name}.svg"), svg)?;
    }
    Ok(())
}

/// All rows by bench, as [`worse`] reads them.
pub fn json(benches: &Benches) -> Value {
    benches.iter().map(|(name, rows)| (name.clone(), serde_json::json!(rows))).collect::<serde_json::Map<_, _>>().into()
}

/// Tables, and the plots beside this page.
fn markdown(benches: &Benches, plots: &[&str]) -> String {
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    let mut out = format!("# Benches\n\nA {profile} build; written by `cargo xtask bench --report`.\n\n");
    for (name, rows) in benches {
        // Writing to a String cannot fail.
        let _ =
            writeln!(out, "## {name}\n\n| figure | value | unit | floor | of the floor | at most | |\n|---|---:|---|---:|---:|---:|---|");
        for row in rows {
            let held = row.holds().map_or("", |holds| if holds { "holds" } else { "**not reached**" });
            let what = row.name.trim().replace('|', "\\|");
            let (value, unit, floor) = (number(Some(row.value)), row.unit, number(row.floor));
            let _ = writeln!(out, "| {what} | {value} | {unit} | {floor} | {} | {} | {held} |", number(row.of_floor()), number(row.target));
        }
        out.push('\n');
    }
    for name in plots {
        let _ = writeln!(out, "![{name}]({name}.svg)");
    }
    out
}

/// What became worse than `tolerance` times what it was in an earlier run: a figure by the floor of its own run, because without one it
/// tells of the machine as much as of us. A figure without a floor is only held against its bound, which it may not cross. One that is
/// there no more is worse than any, unless this run is a `quick` one, which has fewer.
///
/// # Errors
/// When the earlier run is no such JSON, or has no figure of this run that has a floor.
pub fn worse(before: &Value, benches: &Benches, tolerance: f64, quick: bool) -> anyhow::Result<Vec<String>> {
    let mut worse = Vec::new();
    let mut compared = 0;
    for (bench, rows) in benches {
        let old = before[bench.as_str()].as_array().into_iter().flatten();
        let old: BTreeMap<&str, &Value> = old.filter_map(|row| Some((row["name"].as_str()?, row))).collect();
        for row in rows {
            let Some(then) = old.get(row.name.as_str()) else { continue };
            let held = |bounded: &str| Some(then[bounded].as_f64()? <= then["target"].as_f64()?);
            let ratio = || Some(then["value"].as_f64()? / then["floor"].as_f64().filter(|floor| *floor > 0.0)?);
            if let Some((now, then)) = row.of_floor().zip(ratio()) {
                compared += 1;
                if now > then * tolerance {
                    worse.push(format!("{bench}: {}: {now:.2} x its floor, was {then:.2} x", row.name.trim()));
                }
            } else if row.holds() == Some(false) && held(if then["ratio"].is_null() { "value" } else { "ratio" }) == Some(true) {
                worse.push(format!("{bench}: {}: {:.2} {} is past its bound, and was not", row.name.trim(), row.value, row.unit));
            }
        }
        let gone = old.keys().filter(|name| !quick && !rows.iter().any(|row| row.name == **name));
        worse.extend(gone.map(|name| format!("{bench}: {}: not measured any more", name.trim())));
    }
    anyhow::ensure!(compared > 0, "the earlier run has no figure with a floor that this run has too");
    Ok(worse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plot::Plot;

    fn run(value: f64) -> Benches {
        let rows = vec![
            Row::against("A | B", value, "ns", 1.0).target(1.3).at(Plot::PacketCost, "v4", 1.0),
            Row::plain("  alone", 7.0, "ms").target(8.0),
            Row::plain("bounded itself", 6.0 * value, "ms").target(8.0).beside(3.0).at(Plot::PacketCost, "v4", 2.0),
        ];
        vec![("datapath".to_owned(), rows)]
    }

    #[test]
    fn a_figure_is_compared_by_its_floor_and_only_beyond_the_tolerance() {
        let before = json(&run(1.0));
        assert_eq!(worse(&before, &run(1.15), 1.2, false).unwrap(), Vec::<String>::new());
        let told = worse(&before, &run(1.25), 1.2, false).unwrap();
        assert_eq!(told, ["datapath: A | B: 1.25 x its floor, was 1.00 x", "datapath: bounded itself: 2.50 x its floor, was 2.00 x"]);
    }

    #[test]
    fn a_figure_that_vanished_and_one_past_its_bound_are_worse() {
        let mut now = run(1.0);
        let rows = &mut now[0].1;
        rows[1].value = 8.5;
        rows.truncate(2);
        let told = ["datapath: alone: 8.50 ms is past its bound, and was not", "datapath: bounded itself: not measured any more"];
        assert_eq!(worse(&json(&run(1.0)), &now, 1.2, false).unwrap(), told);
        assert_eq!(worse(&json(&run(1.0)), &now, 1.2, true).unwrap(), told[..1], "a quick run has fewer");
        assert_eq!(worse(&json(&now), &now, 1.2, false).unwrap(), [""; 0], "it was past its bound before");
    }

    #[test]
    fn a_comparison_of_nothing_is_an_error() {
        for before in
            [serde_json::json!({"cni": []}), serde_json::json!([1]), serde_json::json!({"datapath": [{"name": "A | B", "value": 1.0}]})]
        {
            assert!(worse(&before, &run(1.0), 1.2, false).is_err(), "{before}");
        }
    }

    #[test]
    fn tables_say_what_holds_and_what_does_not() {
        let text = markdown(&run(1.5), &["packet-cost"]);
        for line in [
            "| A \\| B | 1.50 | ns | 1.00 | 1.50 | 1.30 | **not reached** |",
            "| alone | 7.00 | ms |  |  | 8.00 | holds |",
            "| bounded itself | 9.00 | ms | 3.00 | 3.00 | 8.00 | **not reached** |",
            "![packet-cost](packet-cost.svg)",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn a_report_is_a_page_figures_and_plots_that_a_later_run_can_read() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("new");
        write(&place, &run(1.0)).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["bench.json", "bench.md", "packet-cost.svg"]);
        let read: Value = serde_json::from_str(&std::fs::read_to_string(place.join("bench.json")).unwrap()).unwrap();
        assert_eq!(worse(&read, &run(2.0), 1.2, false).unwrap().len(), 2);
    }
}
