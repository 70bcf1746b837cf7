//! The plugin's GC, as a runtime calls it between other steps.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use rand::RngExt as _;
use stanchion_core::ids::PodName;
use tokio::time::{Instant, sleep};

use super::{SECOND, World, plugin};

impl World {
    /// The runtime tells what lives, and perhaps it has lost a pod without a DEL: that one's address is released, and nothing else.
    pub(super) async fn collect_garbage(&mut self) -> anyhow::Result<()> {
        let plugin = self.plugin();
        if plugin.service.is_none() {
            return Ok(());
        }
        // Releases that wait in the spool would be counted.
        let spooled = fs::read_dir(&plugin.spool)?.count();
        let names: Vec<PodName> = self.pods.keys().cloned().collect();
        let lost = if names.is_empty() || self.random.random_bool(0.5) {
            None
        } else {
            Some(names[self.random.random_range(0..names.len())].clone())
        };
        if let Some(name) = &lost
            && let Some(pod) = self.pods.remove(name)
        {
            tracing::info!(pod = %name, address = %pod.address, "is lost");
            plugin::remove_link(&pod.sandbox.link);
            self.ended.insert(pod.address, Instant::now());
            self.objects.delete(name);
            self.files.close(name);
            self.publish();
        }
        let living = || self.pods.values().map(|pod| &pod.sandbox);
        match plugin.collect_garbage(living()).await {
            Ok(released) => {
                let garbage = u32::from(lost.is_some());
                ensure!(released == garbage || spooled > 0, "{released} attachments were garbage, and {lost:?} was lost");
            }
            Err(_) if lost.is_none() => return Ok(()),
            Err(_) => {
                // It is starting: the runtime asks again, and what it asked before may have been done unheard.
                let agent = self.agent.as_ref().context("an agent")?;
                agent.ipam.ready().await?;
                plugin.collect_garbage(living()).await.context("the agent is ready")?;
            }
        }
        let Some(agent) = &self.agent else { return Ok(()) };
        // What the agent shows follows what it answers.
        sleep(SECOND / 100).await;
        let snapshot = agent.ipam.snapshot();
        let held: BTreeSet<IpAddr> = snapshot.addresses.iter().filter(|view| view.state == "assigned").map(|view| view.address).collect();
        let lives: BTreeSet<IpAddr> = self.pods.values().map(|pod| pod.address.into()).collect();
        ensure!(lives.is_subset(&held), "after the collection {held:?} are held, and {lives:?} live");
        ensure!(spooled > 0 || held == lives, "after the collection {held:?} are held, and {lives:?} live");
        Ok(())
    }
}
