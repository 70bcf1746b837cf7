//! Namespaces and directories of pins that are made without a [`Run`](crate::run::Run): by benches, simulations and tests of a part.
//!
//! Each name says what made it and which process that was, so that what a killed one left is known for what it is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::netns;
use crate::run::remove_netns;

/// Where pins are.
const BPFFS: &str = "/sys/fs/bpf";

/// Who makes things without a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// `bench cni`.
    CniBench,
    /// `bench throughput`.
    ThroughputBench,
    /// Loaded programs and maps without an agent: `bench datapath`, `bench policy`, tests.
    Rig,
    /// Simulations.
    Simulation,
    /// Tests of the plugin.
    CniTest,
    /// Tests of the policy actor.
    DatapathTest,
}

impl Maker {
    /// All.
    pub const ALL: [Self; 6] = [Self::CniBench, Self::ThroughputBench, Self::Rig, Self::Simulation, Self::CniTest, Self::DatapathTest];

    /// What its names begin with, before the number of the process.
    fn prefix(self) -> &'static str {
        match self {
            Self::CniBench => "stcnib",
            Self::ThroughputBench => "stbt",
            Self::Rig => "strig",
            Self::Simulation => "stsim",
            Self::CniTest => "stcni",
            Self::DatapathTest => "stdp",
        }
    }

    /// The name of something that this process makes.
    pub fn name(self, what: &str) -> String {
        self.name_of(std::process::id(), what)
    }

    fn name_of(self, process: u32, what: &str) -> String {
        format!("{}{process}-{what}", self.prefix())
    }

    /// Where this process may pin something.
    pub fn pins(self, what: &str) -> PathBuf {
        Path::new(BPFFS).join(self.name(what))
    }
}

/// The process that made what has the name; `None`: something else did.
fn process_of(name: &str) -> Option<u32> {
    Maker::ALL.into_iter().find_map(|maker| {
        let (process, what) = name.strip_prefix(maker.prefix())?.split_once('-')?;
        let process: u32 = process.parse().ok()?;
        // As it is written, and nothing that only reads the same (`+7`, `007`).
        (maker.name_of(process, what) == name).then_some(process)
    })
}

/// Whether its maker is gone. A number that another process has by now counts as living: that one ends some day too.
fn is_stray(name: &str) -> bool {
    process_of(name).is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists())
}

/// Removes what processes made that are gone.
pub(crate) fn sweep() {
    for name in netns::names("").into_iter().filter(|name| is_stray(name)) {
        remove_netns(&name);
    }
    for entry in fs::read_dir(BPFFS).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_stray)
            && let Err(error) = fs::remove_dir_all(entry.path())
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("lab: cannot remove {}: {error}", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_makers_names_are_known_and_no_others() {
        for maker in Maker::ALL {
            for what in ["n", "p12", "0-node", ""] {
                assert_eq!(process_of(&maker.name_of(4_999_999, what)), Some(4_999_999), "{maker:?} {what:?}");
                assert!(is_stray(&maker.name_of(4_999_999, what)), "no process has this number: the kernel's largest is 2^22");
                assert!(!is_stray(&maker.name(what)), "{maker:?}: this process lives");
            }
        }
        for foreign in [
            "",
            "stanchion",
            "cni-4999999-n",
            "stcni-4999999",
            "stcni4999999",
            "stcnix4999999-n",
            "stdp-bench-4999999",
            "stlab4999999x0-node1",
            "stdp+4999999-n",
            "stdp04999999-n",
            "xstdp4999999-n",
            "stsim99999999999-n",
        ] {
            assert_eq!(process_of(foreign), None, "{foreign}");
        }
    }
}
