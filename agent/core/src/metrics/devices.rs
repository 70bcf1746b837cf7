//! Figures of devices: EFA from sysfs, GPUs and EBS volumes from the exporters that their drivers' pods run on the node.
//!
//! NVIDIA's driver tells its figures through a proprietary library only, which `dcgm-exporter` wraps; an EBS volume tells its own in
//! a log page of its controller, which only a privileged process may read, as the EBS CSI driver's node pod is. The CloudWatch agent
//! asks the same two.
//! <https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/Container-Insights-metrics-enhanced-EKS.html>

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use super::catalog::Field;
use super::rate::Rate;
use super::scrape::{MAX_SERIES, parse};
use crate::cluster::ClusterState;
use crate::objects::Pod;

/// Counters of an EFA device that are told: the file under `hw_counters`, and the field.
pub const EFA_COUNTERS: [(&str, Field); 6] = [
    ("rx_bytes", Field::EfaRxBytes),
    ("tx_bytes", Field::EfaTxBytes),
    ("rx_drops", Field::EfaRxDropped),
    ("rdma_read_bytes", Field::EfaRdmaReadBytes),
    ("rdma_write_bytes", Field::EfaRdmaWriteBytes),
    ("rdma_write_recv_bytes", Field::EfaRdmaWriteRecvBytes),
];

/// Series of dcgm-exporter that are told, the field, and what makes its unit ours.
const GPU_SERIES: [(&str, Field, f64); 7] = [
    ("DCGM_FI_DEV_GPU_UTIL", Field::GpuUtilization, 1.0),
    ("DCGM_FI_DEV_FB_USED_PERCENT", Field::GpuMemoryUtilization, 100.0),
    ("DCGM_FI_DEV_FB_TOTAL", Field::GpuMemoryTotal, 1_048_576.0),
    ("DCGM_FI_DEV_FB_USED", Field::GpuMemoryUsed, 1_048_576.0),
    ("DCGM_FI_DEV_POWER_USAGE", Field::GpuPowerDraw, 1.0),
    ("DCGM_FI_DEV_GPU_TEMP", Field::GpuTemperature, 1.0),
    ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", Field::GpuTensorCoreUtilization, 100.0),
];

/// Series of the EBS CSI driver's node pod that are told; all but the last are counters.
const VOLUME_SERIES: [(&str, Field); 11] = [
    ("aws_ebs_csi_read_ops_total", Field::EbsReadOps),
    ("aws_ebs_csi_write_ops_total", Field::EbsWriteOps),
    ("aws_ebs_csi_read_bytes_total", Field::EbsReadBytes),
    ("aws_ebs_csi_write_bytes_total", Field::EbsWriteBytes),
    ("aws_ebs_csi_read_seconds_total", Field::EbsReadTime),
    ("aws_ebs_csi_write_seconds_total", Field::EbsWriteTime),
    ("aws_ebs_csi_exceeded_iops_seconds_total", Field::EbsVolumeExceededIops),
    ("aws_ebs_csi_exceeded_tp_seconds_total", Field::EbsVolumeExceededThroughput),
    ("aws_ebs_csi_ec2_exceeded_iops_seconds_total", Field::EbsInstanceExceededIops),
    ("aws_ebs_csi_ec2_exceeded_tp_seconds_total", Field::EbsInstanceExceededThroughput),
    ("aws_ebs_csi_volume_queue_length", Field::EbsQueueLength),
];

/// A driver's exporter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Driver {
    /// NVIDIA's `dcgm-exporter`.
    Gpu,
    /// The node pod of the EBS CSI driver, with its metrics switched on (`node.enableMetrics=true`).
    Ebs,
}

impl Driver {
    /// Where it listens unless it was told otherwise.
    const fn port(self) -> u16 {
        match self {
            Self::Gpu => 9400,
            Self::Ebs => 3302,
        }
    }

    /// Whether a pod is one, by the labels of NVIDIA's chart, NVIDIA's operator, the CloudWatch add-on and the EBS CSI driver.
    fn runs_in(self, pod: &Pod) -> bool {
        let label = |key: &str| pod.metadata.labels.get(key).map(String::as_str);
        match self {
            Self::Gpu => {
                label("app.kubernetes.io/name") == Some("dcgm-exporter")
                    || label("app") == Some("nvidia-dcgm-exporter")
                    || label("k8s-app") == Some("dcgm-exporter-service")
            }
            Self::Ebs => label("app") == Some("ebs-csi-node"),
        }
    }
}

/// The exporters on a node: which, and where.
pub fn exporters(cluster: &ClusterState, node: &str) -> Vec<(Driver, SocketAddr)> {
    let here = cluster.pods.values().filter(|pod| pod.spec.node_name == node && pod.status.phase == "Running");
    let mut found: Vec<_> = here
        .filter_map(|pod| {
            let driver = [Driver::Gpu, Driver::Ebs].into_iter().find(|driver| driver.runs_in(pod))?;
            Some((driver, SocketAddr::new(pod.status.pod_ip?, driver.port())))
        })
        .collect();
    found.sort_unstable();
    found
}

/// Counters of an EFA device, in the order of [`EFA_COUNTERS`]; `None` for one that its driver does not have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EfaReading {
    /// `rdmap0s6`
    pub device: String,
    /// Summed over its ports.
    pub counters: [Option<u64>; 6],
}

/// What the exporters told at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExporterReadings {
    /// Grows with each time they were asked; 0 before the first.
    pub round: u64,
    /// GPUs, or parts of such.
    pub gpus: Vec<GpuSample>,
    /// Counters of volumes by id, as [`Field`]s.
    pub volumes: BTreeMap<String, BTreeMap<Field, f64>>,
}

/// Figures of a device that are ready to be told.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DeviceSample {
    /// `rdmap0s6`, `vol-0123…`
    pub device: String,
    /// Per second for EFA, since the tick before for a volume.
    #[serde(skip)]
    pub figures: Vec<(Field, f64)>,
}

/// The container that has a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct GpuOwner {
    /// Its pod's namespace.
    pub namespace: String,
    /// Its pod.
    pub pod: String,
    /// Its name.
    pub container: String,
}

/// A GPU, or the part of one that a container has.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GpuSample {
    /// `nvidia0`
    pub device: String,
    /// `GPU-…`
    pub uuid: String,
    /// Who has it.
    pub owner: Option<GpuOwner>,
    /// What it told.
    #[serde(skip)]
    pub figures: BTreeMap<Field, f64>,
}

impl ExporterReadings {
    /// Takes in what an exporter answered.
    pub fn add(&mut self, driver: Driver, text: &str) {
        match driver {
            Driver::Gpu => self.add_gpus(text),
            Driver::Ebs => self.add_volumes(text),
        }
    }

    fn add_gpus(&mut self, text: &str) {
        // A GPU that is shared has one series for each of its parts and containers.
        let mut gpus: BTreeMap<(String, String, Option<GpuOwner>), GpuSample> = BTreeMap::new();
        for sample in parse(text).take(MAX_SERIES) {
            let Some((_, field, factor)) = GPU_SERIES.into_iter().find(|(name, ..)| *name == sample.name) else { continue };
            if !sample.value.is_finite() {
                continue;
            }
            let label = |keys: &[&str]| {
                let found = keys.iter().find_map(|key| sample.labels.iter().find(|(name, value)| name == key && !value.is_empty()));
                found.map(|(_, value)| value.clone())
            };
            let uuid = label(&["UUID", "uuid"]).unwrap_or_default();
            let device = label(&["device"]).or_else(|| Some(format!("nvidia{}", label(&["gpu"])?))).unwrap_or_default();
            let part = label(&["GPU_I_ID"]).unwrap_or_default();
            // Older releases, and those behind a Prometheus, name the owner otherwise.
            let owner = || {
                let namespace = label(&["namespace", "exported_namespace", "pod_namespace"])?;
                let container = label(&["container", "exported_container", "container_name"])?;
                Some(GpuOwner { namespace, pod: label(&["pod", "exported_pod", "pod_name"])?, container })
            };
            let owner = owner();
            let gpu = gpus.entry((device.clone(), part, owner.clone())).or_insert_with(|| GpuSample {
                device,
                uuid,
                owner,
                figures: BTreeMap::new(),
            });
            gpu.figures.insert(field, sample.value * factor);
        }
        self.gpus.extend(gpus.into_values());
    }

    fn add_volumes(&mut self, text: &str) {
        for sample in parse(text).take(MAX_SERIES) {
            let Some((_, field)) = VOLUME_SERIES.into_iter().find(|(name, _)| *name == sample.name) else { continue };
            let Some((_, volume)) = sample.labels.iter().find(|(key, _)| key == "volume_id") else { continue };
            if sample.value.is_finite() {
                self.volumes.entry(volume.clone()).or_default().insert(field, sample.value);
            }
        }
    }
}

/// The counters of the last tick.
#[derive(Debug, Default)]
pub struct DeviceTracker {
    efa: BTreeMap<String, [Rate; 6]>,
    round: u64,
    volumes: BTreeMap<String, BTreeMap<Field, f64>>,
}

impl DeviceTracker {
    /// Rates of EFA devices; those that are gone are forgotten.
    pub fn efa(&mut self, at: std::time::Duration, readings: &[EfaReading]) -> Vec<DeviceSample> {
        self.efa.retain(|device, _| readings.iter().any(|reading| reading.device == *device));
        let mut out = Vec::new();
        for reading in readings {
            let rates = self.efa.entry(reading.device.clone()).or_default();
            let figures: Vec<_> = EFA_COUNTERS
                .into_iter()
                .zip(reading.counters)
                .zip(rates)
                .filter_map(|(((_, field), counter), rate)| Some((field, rate.update(at, counter?)?)))
                .collect();
            if !figures.is_empty() {
                out.push(DeviceSample { device: reading.device.clone(), figures });
            }
        }
        out
    }

    /// GPUs and volumes of a round of asking that was not told yet: counters as what they grew by since the round before.
    pub fn exported(&mut self, readings: &ExporterReadings) -> (Vec<GpuSample>, Vec<DeviceSample>) {
        if readings.round == self.round {
            return Default::default();
        }
        self.round = readings.round;
        let before = std::mem::replace(&mut self.volumes, readings.volumes.clone());
        let volumes = readings.volumes.iter().filter_map(|(volume, now)| {
            let before = before.get(volume)?;
            let grown = |(field, now): (&Field, &f64)| match field {
                Field::EbsQueueLength => Some((*field, *now)),
                // What went down was counted anew, since when nobody knows.
                _ => Some((*field, now - before.get(field).filter(|before| *before <= now)?)),
            };
            let figures: Vec<_> = now.iter().filter_map(grown).collect();
            (!figures.is_empty()).then(|| DeviceSample { device: volume.clone(), figures })
        });
        (readings.gpus.clone(), volumes.collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const DCGM: &str = include_str!("../../testdata/exporters/dcgm.txt");
    const EBS: &str = include_str!("../../testdata/exporters/ebs-csi-node.txt");

    #[test]
    fn gpus_have_owners_and_units() {
        let mut readings = ExporterReadings { round: 1, ..Default::default() };
        readings.add(Driver::Gpu, DCGM);
        assert_eq!(readings.gpus.len(), 2, "{readings:?}");
        let [used, free] = &readings.gpus[..] else { unreachable!() };
        assert_eq!(used.owner, Some(GpuOwner { namespace: "ml".into(), pod: "train-7d4b".into(), container: "trainer".into() }));
        assert_eq!((used.device.as_str(), free.device.as_str(), &free.owner), ("nvidia0", "nvidia1", &None));
        assert_eq!(used.figures[&Field::GpuUtilization], 87.0);
        assert_eq!(used.figures[&Field::GpuMemoryUsed], 12_000.0 * 1_048_576.0);
        assert_eq!(used.figures[&Field::GpuMemoryUtilization], 80.0);
        assert_eq!(used.figures[&Field::GpuTensorCoreUtilization], 25.0);
        assert_eq!(used.figures[&Field::GpuTemperature], 61.0);
        assert_eq!(used.figures[&Field::GpuPowerDraw], 65.5);
    }

    #[test]
    fn volumes_tell_what_grew_and_each_round_once() {
        let (mut tracker, mut readings) = (DeviceTracker::default(), ExporterReadings { round: 1, ..Default::default() });
        readings.add(Driver::Ebs, EBS);
        assert_eq!(readings.volumes.len(), 2);
        assert_eq!(tracker.exported(&readings).1, [], "the first sight is the baseline");
        assert_eq!(tracker.exported(&readings).1, []);
        readings.round = 2;
        let volume = readings.volumes.get_mut("vol-0281cf921f3dbb69b").unwrap();
        assert_eq!(volume.len(), 11);
        *volume.get_mut(&Field::EbsReadOps).unwrap() += 100.0;
        // A controller that was attached anew.
        *volume.get_mut(&Field::EbsWriteOps).unwrap() = 3.0;
        let told = tracker.exported(&readings).1;
        let figure = |field| told[0].figures.iter().find(|(told, _)| *told == field).map(|(_, value)| *value);
        assert_eq!((told.len(), told[0].device.as_str()), (2, "vol-0281cf921f3dbb69b"));
        assert_eq!((figure(Field::EbsReadOps), figure(Field::EbsWriteOps), figure(Field::EbsReadTime)), (Some(100.0), None, Some(0.0)));
        assert_eq!(figure(Field::EbsQueueLength), Some(2.0));
        assert_eq!(tracker.exported(&readings).1, [], "the same round again");
    }

    #[test]
    fn efa_counters_become_rates() {
        let mut tracker = DeviceTracker::default();
        let reading = |bytes| EfaReading { device: "rdmap0s6".into(), counters: [Some(bytes), Some(1), None, None, None, None] };
        assert_eq!(tracker.efa(Duration::from_secs(1), &[reading(100)]), []);
        let told = tracker.efa(Duration::from_secs(3), &[reading(700)]);
        assert_eq!(told[0].figures, [(Field::EfaRxBytes, 300.0), (Field::EfaTxBytes, 0.0)]);
        assert_eq!(tracker.efa(Duration::from_secs(4), &[]), []);
        assert!(tracker.efa.is_empty(), "a device that is gone is forgotten");
    }

    #[test]
    fn exporters_are_found_by_their_labels_on_this_node() {
        let pod = |name: &str, node: &str, labels: serde_json::Value, phase: &str| -> Arc<Pod> {
            let object = serde_json::json!({"metadata": {"name": name, "namespace": "kube-system", "labels": labels},
                "spec": {"nodeName": node}, "status": {"phase": phase, "podIP": "10.0.0.9"}});
            Arc::new(serde_json::from_value(object).unwrap())
        };
        let mut cluster = ClusterState::default();
        for pod in [
            pod("a", "node1", serde_json::json!({"app.kubernetes.io/name": "dcgm-exporter"}), "Running"),
            pod("b", "node1", serde_json::json!({"app": "ebs-csi-node"}), "Running"),
            pod("c", "node2", serde_json::json!({"app": "ebs-csi-node"}), "Running"),
            pod("d", "node1", serde_json::json!({"app": "nvidia-dcgm-exporter"}), "Pending"),
            pod("e", "node1", serde_json::json!({"app": "web"}), "Running"),
        ] {
            cluster.pods.insert(pod.full_name(), pod);
        }
        let address = |port| SocketAddr::new([10, 0, 0, 9].into(), port);
        assert_eq!(exporters(&cluster, "node1"), [(Driver::Gpu, address(9400)), (Driver::Ebs, address(3302))]);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(DCGM_FI_DEV_GPU_UTIL|aws_ebs_csi_read_ops_total)?[{]?[ -~\n]{0,200}") {
            let mut readings = ExporterReadings::default();
            readings.add(Driver::Gpu, &text);
            readings.add(Driver::Ebs, &text);
        }
    }
}
