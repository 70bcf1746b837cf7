//! Whose lines these are: the pod's identity, and the streams, record and parsers that follow from it.

use std::sync::Arc;

use stanchion_core::cluster::ClusterState;
use stanchion_core::ids::PodName;
use stanchion_core::logs::cri::Output;
use stanchion_core::logs::enrich::Identity;
use stanchion_core::logs::entity;
use stanchion_core::logs::names::glob;
use stanchion_core::logs::parser::Parser;
use stanchion_core::logs::record::{Layout, Merge, RecordOptions, RecordWriter};
use stanchion_core::logs::route::Place;
use stanchion_core::objects::Pod;
use tracing::warn;

use super::super::container::Container;
use super::Tailer;

/// The container's pod was known, and the pod is another one.
fn is_replaced_by(container: &Container, pod: &Pod) -> bool {
    let Some(identity) = container.identity.as_ref().filter(|identity| identity.pod.is_some()) else { return false };
    let named = container.names.as_ref().map_or("", |names| names.uid.as_str());
    !pod.is_known_as(if named.is_empty() { &identity.names.uid } else { named })
}

impl Tailer {
    /// Takes a new state of the cluster: identities of containers whose pod changed are made anew.
    pub fn set_cluster(&mut self, cluster: Arc<ClusterState>) {
        let pods = |state: &ClusterState, names: &PodName| state.pods.get(names).cloned();
        let mut changed = Vec::new();
        for (id, container) in &self.containers {
            let Some(names) = &container.names else { continue };
            let key = PodName::new(names.namespace.clone(), names.pod.clone());
            match (pods(&self.cluster, &key), pods(&cluster, &key)) {
                // A pod that is gone keeps its last known identity.
                (_, None) => {}
                (Some(old), Some(new)) if Arc::ptr_eq(&old, &new) => {}
                // So does one whose name another pod has now.
                (_, Some(new)) if is_replaced_by(container, &new) => {}
                _ => changed.push(*id),
            }
        }
        self.cluster = cluster;
        for id in changed {
            if let Some(mut container) = self.containers.remove(&id) {
                self.identify(&mut container);
                self.containers.insert(id, container);
                self.schedule(id, 0);
            }
        }
    }

    pub(super) fn identify(&mut self, container: &mut Container) {
        let settings = &self.parts.settings;
        let identity = container.names.as_ref().map(|names| {
            let pod = self.cluster.pods.get(&PodName::new(names.namespace.clone(), names.pod.clone()));
            Identity::new(names, pod.map(|pod| &**pod))
        });
        let place = Place { cluster: &self.parts.cluster_name, node: &self.parts.node, file: &container.file_name };
        let any = |globs: &[String]| globs.iter().any(|pattern| glob(pattern, &container.file_name));
        let route = settings.routes.iter().find(|route| container.host.is_none() && any(&route.files));
        let (group, stream) = match (container.host, route) {
            (Some(host), _) => (&settings.host_files[host].group, &settings.host_files[host].stream),
            (None, Some(route)) => (&route.group, &route.stream),
            (None, None) => (&settings.group, &settings.stream),
        };
        // What Fluent Bit's kubernetes filter does is not for the node's files. Of the other layouts no record says more or less.
        let filtered = container.host.is_none() && route.is_none_or(|route| route.kubernetes);
        let kubernetes = filtered || settings.record.layout != Layout::FluentBit;
        let instance = settings.entity.as_deref().filter(|_| container.host.is_none());
        let entity = instance
            .zip(identity.as_ref())
            .and_then(|(instance, identity)| entity::of(identity, entity::Place { cluster: place.cluster, node: place.node, instance }));
        let before = container.streams;
        container.streams = [Output::Stdout, Output::Stderr].map(|output| {
            let excluded = kubernetes && settings.honour_exclude && identity.as_ref().is_some_and(|identity| identity.is_excluded(output));
            (!excluded).then(|| {
                let group = group.group(place, identity.as_ref(), output);
                let stream = stream.stream(place, identity.as_ref(), output);
                self.streams.join(&group, &stream, settings.emf, entity.clone())
            })
        });
        before.into_iter().flatten().for_each(|stream| self.streams.leave(stream));
        let node = if route.is_some_and(|route| route.node) { &settings.node[..] } else { &[] };
        let writer = if kubernetes {
            let parsers = [Output::Stdout, Output::Stderr].map(|output| self.parser(identity.as_ref(), output));
            RecordWriter::with_members(&settings.record, identity.as_ref(), node).parsing(parsers)
        } else {
            let record = RecordOptions { merge: Merge::Off, ..settings.record.clone() };
            RecordWriter::with_members(&record, None, node)
        };
        container.writer = writer.oversize(settings.oversize);
        container.identity = identity;
    }

    /// The parser that the pod names for the output.
    pub(super) fn parser(&self, identity: Option<&Identity>, output: Output) -> Option<Parser> {
        let settings = &self.parts.settings;
        if !settings.honour_parser || settings.record.merge == Merge::Off {
            return None;
        }
        let name = identity?.fluent_bit_annotation("parser", output)?;
        let parser = settings.parsers.iter().find(|parser| parser.name == name);
        if parser.is_none() {
            warn!(pod = identity?.names.pod, parser = name, "the pod names a parser that is not known: its lines are read as JSON");
        }
        parser.cloned()
    }
}
