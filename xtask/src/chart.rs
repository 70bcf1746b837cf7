//! The manifests are what the chart renders, and its schema refuses what it should: by Helm's own engine, from PyPI.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::{setup, ui};

/// Helm's engine as a Python package, with its version.
const ENGINE: &str = "helm-python-sdk==0.2.2";

/// Runs `deploy/render.py --check` in an environment of its own below `target`.
pub(crate) fn check(root: &Path) -> Result<()> {
    let environment = root.join("target/helm");
    let python = environment.join("bin/python");
    if !environment.join("ready").exists() {
        if !Path::new("/usr/share/doc/python3-venv").exists() {
            setup::apt_install("install what renders the chart", &["python3-venv"])?;
        }
        ui::step("make a Python environment", Command::new("/usr/bin/python3").args(["-m", "venv", "--clear"]).arg(&environment))?;
        ui::step("fetch Helm's engine", Command::new(&python).args(["-m", "pip", "install", "--quiet", ENGINE]))?;
        std::fs::write(environment.join("ready"), ENGINE)?;
    }
    ui::step("chart and manifests", Command::new(&python).arg("deploy/render.py").arg("--check").current_dir(root))
}
