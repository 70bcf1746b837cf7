//! CNI's GC: the runtime says what lives, the rest gives its addresses back.

use std::time::Duration;

use stanchion_core::ipam::{Checkpoint, IpamKey};
use stanchion_lab::ipam_world::{World, WorldSpec, key};

const SECOND: Duration = Duration::from_secs(1);

/// Names of the pods that the checkpoint holds.
fn kept(world: &World) -> Vec<String> {
    let text = std::fs::read_to_string(world.checkpoint()).expect("written before the reply");
    let mut names: Vec<String> =
        Checkpoint::parse(&text).expect("aws-node's format").allocations.iter().map(|entry| entry.metadata.name.clone()).collect();
    names.sort();
    names
}

#[tokio::test(start_paused = true)]
async fn what_the_runtime_does_not_name_rests_and_all_else_stays() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "3")]));
    world.handle.ready().await.expect("ready");
    let mut given = Vec::new();
    for name in ["a", "b", "c"] {
        given.push(world.add(name, SECOND * 30).await.expect("served"));
    }
    let network = key("a").network_name;
    let elsewhere = IpamKey { network_name: "another".to_owned(), ..key("b") };
    assert_eq!(world.handle.collect_garbage("another", Vec::new()).await, Ok(0), "each network has its own garbage");
    assert_eq!(world.handle.collect_garbage(&network, vec![key("a"), elsewhere]).await, Ok(2));
    assert_eq!(kept(&world), ["a"]);
    assert_eq!(world.handle.lookup(key("a")).await, Ok(Some(given[0].clone())));
    for name in ["b", "c"] {
        assert_eq!(world.handle.lookup(key(name)).await, Ok(None));
        assert_eq!(world.delete(name).await, Ok(None), "the DEL that comes late finds nothing and is content");
    }
    assert_eq!(world.handle.collect_garbage(&network, vec![key("a")]).await, Ok(0));
    let fresh = world.add("d", SECOND * 30).await.expect("served");
    assert!(given.iter().all(|earlier| earlier.attachments[0].ipv4 != fresh.attachments[0].ipv4), "they cool as after a DEL");
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn garbage_whose_release_cannot_be_written_stays_assigned() {
    let mut world = World::start(WorldSpec::new("m5.large", &[("WARM_IP_TARGET", "3")]));
    world.handle.ready().await.expect("ready");
    let given = world.add("a", SECOND * 30).await.expect("served");
    let network = key("a").network_name;
    // A directory in the place of the temporary file: the next write fails, as on a full disk.
    let temporary = world.checkpoint().with_extension("json.tmp");
    std::fs::create_dir(&temporary).expect("made");
    assert!(world.handle.collect_garbage(&network, Vec::new()).await.is_err(), "not durable");
    assert_eq!(world.handle.lookup(key("a")).await, Ok(Some(given)));
    std::fs::remove_dir(&temporary).expect("removed");
    assert_eq!(world.handle.collect_garbage(&network, Vec::new()).await, Ok(1), "the runtime asks again");
    assert_eq!(kept(&world), [""; 0]);
    world.stop().await;
}
