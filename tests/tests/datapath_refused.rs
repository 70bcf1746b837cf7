//! A kernel that has no memory for map entries, or refuses them otherwise: what is enforced stays, what is new fails and says why,
//! and when entries are taken again all of it is there.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's, and names its line")]

mod datapath_support;

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use datapath_support::{WORKS, World, deny_in, echoes, policy};
use stanchion_core::policy::image::Refusal;
use stanchion_daemon::netpol::{ActivateError, AttachMode, NetpolSnapshot};
use stanchion_lab::refusals::Refusals;
use stanchion_lab::wait::wait_for;

/// The next try comes after a second, or after nine times what the last one took.
const MENDED: Duration = Duration::from_secs(60);

/// A node whose agent can be refused map entries, with all pods but y/b.
fn world() -> (World, Refusals) {
    let mut world = World::new(AttachMode::Clsact);
    world.stop();
    let refusals = Refusals::default();
    world.refusals = Some(refusals.clone());
    world.start();
    world.apply("");
    for pod in ["x/a", "x/b", "y/a"] {
        world.activate(pod).unwrap();
    }
    (world, refusals)
}

fn snapshot(world: &World) -> Arc<NetpolSnapshot> {
    world.runtime.block_on(world.agent().snapshot())
}

fn mended(world: &World) {
    let ready = wait_for("every policy in the maps", MENDED, || async {
        let snapshot = world.agent().snapshot().await;
        ensure!(snapshot.ready, "{}", snapshot.reason);
        Ok(())
    });
    world.runtime.block_on(ready).unwrap();
}

/// Lets x/b in at one port, and a pod of namespace y at another.
fn lets_in(port: u16, of_y: &str) -> String {
    let from = |namespace: &str, pod: &str| {
        format!("{{from: [{{namespaceSelector: {{matchLabels: {{ns: \"{namespace}\"}}}}, podSelector: {{matchLabels: {{pod: {pod}}}}}}}]")
    };
    policy(
        "x",
        "in",
        "a",
        &format!("  ingress: [{}, ports: [{{port: 80}}]}}, {}, ports: [{{port: {port}}}]}}]\n", from("x", "b"), from("y", of_y)),
    )
}

fn restarts_without_a_write(world: &mut World) {
    world.stop();
    world.start();
    let policies = world.policies.clone();
    world.apply(&policies);
    let snapshot = snapshot(world);
    assert_eq!((snapshot.ready, snapshot.map_writes), (true, 0), "the maps are what the policies say: {}", snapshot.reason);
}

#[test]
fn a_kernel_that_takes_no_entries_stops_what_is_new_and_nothing_else() {
    let (mut world, refusals) = world();
    for (errno, refusal) in
        [(libc::ENOMEM, Refusal::NoMemory), (libc::E2BIG, Refusal::Full), (libc::ENOSPC, Refusal::Full), (libc::EBUSY, Refusal::Other)]
    {
        world.apply(&lets_in(80, "b"));
        let mut open = world.works("x/b", "x/a", 80);
        refusals.refuse_map_updates(0, errno);
        world.apply(&lets_in(81, "a"));
        let behind = snapshot(&world);
        let cause = std::io::Error::from_raw_os_error(errno).to_string();
        assert!(!behind.ready && behind.reason.contains(&cause), "{}", behind.reason);
        assert!(behind.last_error.contains(&cause), "{}", behind.last_error);
        assert_eq!(behind.reason.contains("memory limit"), refusal == Refusal::NoMemory, "{}", behind.reason);
        assert!(echoes(&mut open, WORKS), "an open connection goes on");
        world.works("x/b", "x/a", 80);
        world.blocked("y/a", "x/a", 81);
        world.blocked("y/a", "x/a", 80);
        let refused = world.activate("y/b").unwrap_err();
        assert!(matches!(&refused, ActivateError::Maps(cause) if cause.refusal == refusal), "{refused:?}");
        assert_eq!(snapshot(&world).endpoints.len(), 3, "nothing is left of it");
        assert!(refusals.lift() > 0);
        mended(&world);
        world.works("y/a", "x/a", 81);
        world.blocked("y/a", "x/a", 80);
        assert!(echoes(&mut open, WORKS));
        restarts_without_a_write(&mut world);
    }
    world.activate("y/b").unwrap();
    world.works("y/b", "y/a", 80);
}

/// At every entry of a change in turn, and for as long as it lasts.
#[test]
fn without_memory_in_the_middle_of_a_change_nobody_gets_in_whom_neither_policy_lets_in() {
    let (mut world, refusals) = world();
    world.activate("y/b").unwrap();
    world.apply(&lets_in(80, "a"));
    let mut open = world.works("x/b", "x/a", 80);
    for first in 0.. {
        // There and back: what one lets in the other does not.
        let (now, was) = if first % 2 == 0 { ((81, "b"), (80, "a")) } else { ((80, "a"), (81, "b")) };
        refusals.refuse_map_updates(first, libc::ENOMEM);
        world.apply(&lets_in(now.0, now.1));
        let is_behind = !snapshot(&world).ready;
        let from = |who: &str| format!("y/{who}");
        world.blocked(&from(now.1), "x/a", was.0);
        world.blocked(&from(was.1), "x/a", now.0);
        world.blocked("x/b", "x/a", 81);
        assert!(echoes(&mut open, WORKS), "an open connection goes on");
        world.works("x/b", "x/a", 80);
        assert_eq!(refusals.lift() > 0, is_behind, "after {first} entries");
        mended(&world);
        world.works(&from(now.1), "x/a", now.0);
        world.blocked(&from(was.1), "x/a", was.0);
        if !is_behind {
            assert!(first > 2, "a change of {first} entries");
            break;
        }
    }
    restarts_without_a_write(&mut world);
}

/// It goes on as it did rather than be cut off by programs that find no policy.
#[test]
fn a_pod_that_runs_is_not_touched_until_its_policy_can_be_written() {
    let (mut world, refusals) = world();
    world.bring_up("y/b");
    world.apply(&policy("y", "in", "b", ""));
    let mut opened_by_it = world.works("y/b", "x/b", 80);
    world.works("x/b", "y/b", 80);
    refusals.refuse_map_updates(0, libc::ENOMEM);
    let refused = world.adopt("y/b").unwrap_err();
    assert!(matches!(&refused, ActivateError::Maps(cause) if cause.refusal == Refusal::NoMemory), "{refused:?}");
    assert_eq!(snapshot(&world).endpoints.len(), 3);
    world.works("x/b", "y/b", 80);
    assert!(refusals.lift() > 0);
    mended(&world);
    assert_eq!(world.adopt("y/b").unwrap(), 1);
    world.blocked("x/b", "y/b", 80);
    assert!(echoes(&mut opened_by_it, WORKS), "an open connection goes on");
    assert_eq!(world.adopt("y/b").unwrap(), 0, "it is active");
}

/// A pod's first policy needs the kernel's word of its open connections.
#[test]
fn a_first_policy_waits_until_open_connections_can_be_read() {
    let (mut world, refusals) = world();
    let mut open = world.works("x/a", "x/b", 80);
    refusals.refuse_netlink(libc::ENOBUFS);
    world.apply(&deny_in());
    let behind = snapshot(&world);
    assert!(!behind.ready && behind.reason.contains("connections"), "{}", behind.reason);
    assert!(refusals.lift() > 0);
    mended(&world);
    // Before the pod sends again: what comes in on it is an answer.
    let flows = world.runtime.block_on(world.agent().clone().conntrack());
    assert!(flows.iter().any(|flow| flow.opened_by_pod && flow.remote_port == 80), "{flows:?}");
    assert!(echoes(&mut open, WORKS));
    world.blocked("y/a", "x/a", 80);
    // One that cannot be had at all does not keep policy away.
    refusals.refuse_netlink(libc::EPERM);
    world.apply(&(deny_in() + &policy("y", "deny-in", "a", "  policyTypes: [Ingress]\n")));
    world.blocked("x/b", "y/a", 80);
}
