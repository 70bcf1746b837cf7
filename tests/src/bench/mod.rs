//! Benches: each prints figures beside a floor or yardstick that was measured in the same run.

pub mod cni;
pub mod datapath;
pub mod idle;
mod idle_agent;
mod log_rate;
pub mod logs;
mod plot;
pub mod policy;
pub mod pool;
pub mod report;
pub mod throughput;
mod tick;

use std::time::Instant;

use serde::Serialize;

use plot::{Plot, Point};

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured, with its parameters.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// The floor or yardstick of the same run, in the same unit.
    pub floor: Option<f64>,
    /// value / floor, where that is what is bounded.
    pub ratio: Option<f64>,
    /// What the ratio (or, without a floor, the value) may be at most.
    pub target: Option<f64>,
    /// Where it lies in a plot.
    #[serde(skip)]
    point: Option<Point>,
}

impl Row {
    /// A figure by itself.
    pub fn plain(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, floor: None, ratio: None, target: None, point: None }
    }

    /// A figure beside its floor.
    pub fn against(name: impl Into<String>, value: f64, unit: &'static str, floor: f64) -> Self {
        let ratio = (floor > 0.0).then_some(value / floor);
        Self { ratio, floor: Some(floor), ..Self::plain(name, value, unit) }
    }

    /// With the bound that the specification promises.
    #[must_use]
    pub fn target(mut self, target: f64) -> Self {
        self.target = Some(target);
        self
    }

    /// With a floor beside it, where the figure itself is what is bounded.
    #[must_use]
    pub fn beside(mut self, floor: f64) -> Self {
        self.floor = Some(floor);
        self
    }

    /// As a point of a plot.
    #[must_use]
    fn at(mut self, plot: Plot, series: impl Into<String>, x: f64) -> Self {
        self.point = Some(Point { plot, series: series.into(), x });
        self
    }

    /// value / floor, whatever is bounded.
    fn of_floor(&self) -> Option<f64> {
        self.floor.filter(|floor| *floor > 0.0).map(|floor| self.value / floor)
    }

    /// Whether the promise holds; `None` where none was made.
    pub fn holds(&self) -> Option<bool> {
        self.target.map(|target| self.ratio.unwrap_or(self.value) <= target)
    }
}

/// Tells on the standard error what a bench is at, so that one who waits sees that it goes on.
#[derive(Debug)]
pub(crate) struct Progress(Instant);

impl Progress {
    /// Counts from now.
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// What begins now.
    pub(crate) fn at(&self, what: impl std::fmt::Display) {
        eprintln!("  {:6.1} s  {what}", self.0.elapsed().as_secs_f64());
    }
}
