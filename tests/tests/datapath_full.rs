//! Maps that the kernel lets no more into: what is enforced stays, what is new fails and says why, and room is used when it is there.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

mod datapath_support;

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use datapath_support::{WORKS, World, deny_in, echoes, policy};
use stanchion_core::policy::image::Refusal;
use stanchion_daemon::netpol::{ActivateError, AttachMode, NetpolSnapshot};
use stanchion_ebpf_abi::map_name;
use stanchion_lab::datapath::layout;
use stanchion_lab::wait::wait_for;

/// Room for the entries of a few rules.
const ROOM: u32 = 16;

/// The next try comes after a second, or after nine times what the last one took.
const MENDED: Duration = Duration::from_secs(60);

fn snapshot(world: &World) -> Arc<NetpolSnapshot> {
    world.runtime.block_on(world.agent().snapshot())
}

/// Rules of y/a for so many ports, each an entry.
fn many_ports(count: u32) -> String {
    let ports: Vec<String> = (0..count).map(|n| format!("{{port: {}}}", 1_001 + 2 * n)).collect();
    policy("y", "many-ports", "a", &format!("  ingress: [{{ports: [{}]}}]\n", ports.join(", ")))
}

fn mended(world: &World) {
    let ready = wait_for("every policy in the maps", MENDED, || async {
        let snapshot = world.agent().snapshot().await;
        ensure!(snapshot.ready, "{}", snapshot.reason);
        Ok(())
    });
    world.runtime.block_on(ready).unwrap();
}

#[test]
fn a_full_map_stops_what_is_new_and_nothing_else() {
    let mut world = World::new(AttachMode::Clsact);
    world.stop();
    layout::shrink(&world.pin_root, map_name::VERDICTS, ROOM).unwrap();
    world.start();
    let few =
        deny_in() + &policy("x", "from-b", "a", "  ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{port: 80}]}]\n");
    world.apply(&few);
    for pod in ["x/a", "x/b", "y/a"] {
        world.activate(pod).unwrap();
    }
    let mut open = world.works("x/b", "x/a", 80);

    // More than there is room for: first on a pod without policy, then on one that has some.
    for has_policy in [false, true] {
        world.apply(&(few.clone() + &many_ports(3 * ROOM)));
        let full = snapshot(&world);
        assert!(!full.ready && full.reason.contains("map VERDICTS") && full.reason.contains("full"), "{}", full.reason);
        assert!(echoes(&mut open, WORKS), "an open connection goes on");
        world.works("x/b", "x/a", 80);
        world.blocked("y/a", "x/a", 80);
        // Not half of its new policy: what y/a was, it is.
        if has_policy {
            world.blocked("x/b", "y/a", 81);
        } else {
            world.works("x/b", "y/a", 81);
        }
        let refused = world.activate("y/b").unwrap_err();
        assert!(
            matches!(&refused, ActivateError::Maps(cause) if cause.refusal == Refusal::Full && cause.map == map_name::VERDICTS),
            "{refused:?}"
        );
        assert_eq!(snapshot(&world).endpoints.len(), 3, "nothing is left of it");

        // What it becomes fits: first what was written of the other goes.
        world.apply(&(few.clone() + &many_ports(ROOM / 2)));
        mended(&world);
        world.blocked("x/b", "y/a", 81);
        assert!(echoes(&mut open, WORKS));
        world.blocked("y/a", "x/a", 80);
    }
    world.apply(&few);
    mended(&world);
    world.works("x/b", "y/a", 81);
    world.activate("y/b").unwrap();
    world.works("x/b", "y/b", 80);
    assert!(echoes(&mut open, WORKS));
}

/// Pods elsewhere that `x/a` lets in, by the last numbers of their addresses.
fn far(numbers: std::ops::Range<u32>) -> String {
    let pod = |number| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: far-{number}, namespace: \"y\", labels: {{app: far}}}}\n\
             spec: {{nodeName: node2, containers: []}}\nstatus: {{phase: Running, podIP: 10.78.0.{number}}}\n"
        )
    };
    numbers.map(pod).collect()
}

#[test]
fn addresses_that_go_make_room_for_those_that_come() {
    let mut world = World::new(AttachMode::Clsact);
    world.stop();
    layout::shrink(&world.pin_root, map_name::ADDRESSES, ROOM).unwrap();
    world.start();
    let rules = policy("x", "from-far", "a", "  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: far}}}]}]\n");
    world.extra_pods = far(1..ROOM);
    world.apply(&rules);
    world.activate_all();
    assert!(snapshot(&world).ready, "just as many as there is room for beside the node's address");
    // All of them are replaced in one change.
    world.extra_pods = far(100..99 + ROOM);
    world.apply(&rules);
    assert!(snapshot(&world).ready, "{}", snapshot(&world).reason);
    // One too many, and then no longer.
    world.extra_pods = far(1..1 + ROOM);
    world.apply(&rules);
    let full = snapshot(&world);
    assert!(!full.ready && full.reason.contains("map ADDRESSES") && full.reason.contains("full"), "{}", full.reason);
    world.blocked("x/b", "x/a", 80);
    world.extra_pods = far(200..199 + ROOM);
    world.apply(&rules);
    mended(&world);
    world.blocked("x/b", "x/a", 80);
}
