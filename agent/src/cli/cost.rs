//! `stanchion plan cost`: what Container Insights metrics cost a month, by preset.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use stanchion_core::metrics::catalog::Preset;
use stanchion_core::metrics::cost::{Bill, ClusterSize, bill};
use stanchion_core::metrics::insights::Selection;

use super::table::Table;

/// Monthly cost of the metric presets for a cluster of a given size.
#[derive(clap::Args)]
pub(crate) struct CostArgs {
    /// Nodes
    #[arg(long, default_value_t = 3)]
    nodes: u64,
    /// Pods of all nodes
    #[arg(long)]
    pods: u64,
    /// Namespaces with pods
    #[arg(long)]
    namespaces: u64,
    /// Deployments, DaemonSets and so on [default: a third of the pods]
    #[arg(long)]
    workloads: Option<u64>,
    /// Services that select pods [default: as many as workloads]
    #[arg(long)]
    services: Option<u64>,
    /// Containers of a pod
    #[arg(long, default_value_t = 1)]
    containers_per_pod: u64,
    /// Disks of a node
    #[arg(long, default_value_t = 1)]
    disks_per_node: u64,
    /// EFA devices of a node
    #[arg(long, default_value_t = 0)]
    efa_per_node: u64,
    /// EBS volumes of a node that the CSI driver attached, with its metrics switched on
    #[arg(long, default_value_t = 0)]
    csi_volumes_per_node: u64,
    /// GPUs of a node, with dcgm-exporter
    #[arg(long, default_value_t = 0)]
    gpus_per_node: u64,
    /// Seconds between ticks
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Types of documents and metrics that are left out, as STANCHION_METRICS_WITHOUT has them
    #[arg(long, value_delimiter = ',', env = "STANCHION_METRICS_WITHOUT")]
    without: Vec<String>,
}

/// What each preset costs.
fn bills(size: &ClusterSize, without: &[String]) -> Result<Vec<Bill>> {
    let selection = |preset| {
        let words = without.iter().map(|word| word.trim()).filter(|word| !word.is_empty());
        words.into_iter().try_fold(Selection { preset, ..Selection::default() }, Selection::without)
    };
    Preset::ALL.into_iter().map(|preset| Ok(bill(&selection(preset).context("--without")?, size))).collect()
}

/// Prints one row a preset.
pub(super) fn run(args: &CostArgs, json: bool) -> Result<ExitCode> {
    let workloads = args.workloads.unwrap_or(args.pods.div_ceil(3));
    let size = ClusterSize {
        nodes: args.nodes,
        pods: args.pods,
        namespaces: args.namespaces,
        workloads,
        services: args.services.unwrap_or(workloads),
        containers_per_pod: args.containers_per_pod,
        disks_per_node: args.disks_per_node,
        efa_per_node: args.efa_per_node,
        csi_volumes_per_node: args.csi_volumes_per_node,
        gpus_per_node: args.gpus_per_node,
        interval_seconds: args.interval,
    };
    let bills = bills(&size, &args.without)?;
    if json {
        println!("{}", serde_json::json!({ "cluster": size, "presets": bills }));
        return Ok(ExitCode::SUCCESS);
    }
    print!("{}", table(&bills));
    println!(
        "\nUSD a month at us-east-1 list prices without free tier or discounts. METRICS are what CloudWatch keeps under custom-metric"
    );
    println!(
        "prices; the preset in force is STANCHION_METRICS_PRESET's. AWS may bill Container Insights with enhanced observability by observation instead (last column, replaces TOTAL)."
    );
    Ok(ExitCode::SUCCESS)
}

fn table(bills: &[Bill]) -> String {
    let mut table = Table::new(&[
        "PRESET",
        ">METRICS",
        ">METRICS $",
        ">DOCUMENTS GB",
        ">DOCUMENTS $",
        ">TOTAL $",
        ">OBSERVATIONS M",
        ">BY OBSERVATION $",
    ]);
    for bill in bills {
        table.row([
            bill.preset.name().to_owned(),
            bill.metrics.to_string(),
            format!("{:.2}", bill.metrics_usd),
            format!("{:.1}", bill.ingested_gb),
            format!("{:.2}", bill.ingestion_usd),
            format!("{:.2}", bill.total_usd),
            format!("{:.1}", bill.observations as f64 / 1e6),
            format!("{:.2}", bill.observations_usd),
        ]);
    }
    table.render("no presets")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_a_preset() {
        let size = ClusterSize {
            nodes: 3,
            pods: 60,
            namespaces: 5,
            workloads: 20,
            services: 10,
            containers_per_pod: 1,
            disks_per_node: 1,
            efa_per_node: 0,
            csi_volumes_per_node: 0,
            gpus_per_node: 0,
            interval_seconds: 60,
        };
        let bills = bills(&size, &[]).unwrap();
        assert!(super::bills(&size, &["Nothing".to_owned()]).is_err());
        let text = table(&bills);
        let presets: Vec<_> = text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(presets, ["logsonly", "minimal", "standard", "enhanced"]);
        let told = include_str!("../../../deploy/METRICS.md");
        for line in text.lines() {
            assert!(told.lines().any(|told| told == line), "deploy/METRICS.md does not say {line:?}");
        }
    }
}
