//! A fleet of nodes on virtual time against one account's EC2: what a burst of pods, a rolling replacement or a scale-down
//! costs, by our planner and by a model of aws-node's rules.
//!
//! ```text
//!            events (time, node)
//!   Clock ───────────────────────► Node (ours: the daemon's planner; aws-node: its 5 s loop)
//!     ▲                               │ calls, one step at a time
//!     └──── replies, throttles ◄──── Ec2 (a token bucket an action, for the whole account)
//! ```
//!
//! A fleet larger than [`FleetQuestion::most_nodes`] is simulated by that many nodes against buckets that are smaller in the
//! same proportion; calls and addresses are scaled back in the answer, which says so.

mod aws_node;
mod ec2;
mod ours;

use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use serde::Serialize;

pub use ec2::{CallCount, Ec2Model};

use super::plan::{PoolLimits, Targets};
use crate::cloud::Ec2Action;
use ec2::Account;

/// From the scheduler's binding to the runtime's ADD.
const BIND_TO_ADD: u64 = 500;
/// aws-node's loop; nodes are at different points of it.
const LOOP_PERIOD: u64 = 5_000;
/// An ADD that failed is tried again by the kubelet after 10 to 15 s (its `backOffPeriod` and jitter).
const SANDBOX_RETRY: (u64, u64) = (10_000, 5_000);
/// A replaced pod's successor is bound this much after the old one ended.
const REPLACED_AFTER: u64 = 1_000;
/// What a fleet is given to come to rest after the last pod came or went: two cool-downs, the surplus' minute, and a minute
/// for the calls.
const REST: u64 = 240_000;
/// When the scenario begins: the fleet has been up for an hour.
const START: u64 = 3_600_000;
/// Nothing goes on longer; pods without an address by then count as unserved.
const LONGEST: u64 = 4 * 3_600_000;

/// What happens to the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// A warm fleet without pods gets all of them.
    Burst,
    /// Every pod of a full fleet is replaced by another on the same node.
    Rolling,
    /// Every pod of a full fleet ends.
    Zero,
}

/// Whose rules the nodes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rules {
    /// A model of aws-node v1.23: a loop of 5 s, one step a tick, cooling addresses counted as free, the SDK's three tries.
    AwsNode,
    /// The planner that the daemon runs.
    Stanchion,
}

/// A fleet question.
#[derive(Clone, Debug, PartialEq)]
pub struct FleetQuestion {
    /// Nodes, all of one type.
    pub nodes: u32,
    /// Pods of a node that need an address.
    pub pods_per_node: u32,
    /// The warm targets.
    pub targets: Targets,
    /// What an instance can hold.
    pub limits: PoolLimits,
    /// What happens.
    pub scenario: Scenario,
    /// Within how long it happens to all pods, evenly.
    pub over: Duration,
    /// IP_COOLDOWN_PERIOD.
    pub cooldown: Duration,
    /// The account.
    pub ec2: Ec2Model,
    /// Nodes that are simulated one by one; the rest is scaled.
    pub most_nodes: u32,
    /// Of the order of events.
    pub seed: u64,
}

/// What it came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FleetAnswer {
    /// EC2 calls by action.
    pub calls: BTreeMap<String, CallCount>,
    /// All calls.
    pub calls_total: u64,
    /// Those that EC2 refused with RequestLimitExceeded.
    pub throttled_total: u64,
    /// Pods that asked for an address.
    pub pods: u64,
    /// Pods that had none when the simulation ended.
    pub unserved: u64,
    /// Seconds from a pod's first ADD to its address: half of the pods waited no longer.
    pub wait_p50_s: f64,
    /// 99 of 100 waited no longer.
    pub wait_p99_s: f64,
    /// The longest wait.
    pub wait_max_s: f64,
    /// Addresses that no pod holds when the fleet has come to rest.
    pub idle_addresses: u64,
    /// ENIs then, the primary ones among them.
    pub enis: u64,
    /// Seconds until the last EC2 call.
    pub busy_s: f64,
    /// Nodes that were simulated one by one.
    pub simulated_nodes: u32,
}

/// Something that happens to a node. Times are milliseconds of virtual time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The scheduler bound a pod to it.
    Bound,
    /// A pod asks for its address, for the first time at `since`.
    Ask { since: u64 },
    /// A pod ends; `replaced` if another comes for it.
    End { replaced: bool },
    /// A call of one of its jobs is sent.
    Send { job: u32 },
    /// Its reply.
    Reply { job: u32, admitted: bool },
    /// An interface came up, or a wait of a job ended.
    Ready { job: u32 },
    /// To look again though nothing happened.
    Wake,
}

/// The queue and the account, as a node sees them.
struct World {
    now: u64,
    sequence: u64,
    /// Earliest first; events of one instant in the order of their making.
    queue: BinaryHeap<std::cmp::Reverse<(u64, u64, u32, Event)>>,
    ec2: Account,
    random: Random,
    waits: Vec<u32>,
    asked: u64,
    last_call: u64,
    /// The last call that EC2 let through.
    last_done: u64,
}

impl World {
    fn new(now: u64, ec2: Account, seed: u64) -> Self {
        let queue = BinaryHeap::new();
        Self { now, sequence: 0, queue, ec2, random: Random(seed), waits: Vec::new(), asked: 0, last_call: now, last_done: now }
    }

    fn at(&mut self, after: u64, node: u32, event: Event) {
        self.sequence += 1;
        self.queue.push(std::cmp::Reverse((self.now + after, self.sequence, node, event)));
    }

    /// Sends a call; its reply comes after EC2's latency.
    fn call(&mut self, node: u32, job: u32, action: Ec2Action) {
        let admitted = self.ec2.call(action, self.now);
        self.last_call = self.now;
        if admitted {
            self.last_done = self.now;
        }
        let latency = self.ec2.latency();
        self.at(latency, node, Event::Reply { job, admitted });
    }

    fn served(&mut self, since: u64) {
        self.waits.push(u32::try_from(self.now - since).unwrap_or(u32::MAX));
    }

    fn retry_pause(&mut self) -> u64 {
        SANDBOX_RETRY.0 + self.random.below(SANDBOX_RETRY.1)
    }
}

/// A node that follows some rules.
trait Node {
    fn handle(&mut self, id: u32, event: Event, world: &mut World);
    /// Addresses that no pod holds, and ENIs.
    fn idle(&self) -> (u64, u64);
}

/// Splitmix64: the same everywhere.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// 0 to `bound` - 1; 0 for 0.
    fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }
}

/// Simulates the fleet. `progress` is told how much of the events is done, in 0..=1, some hundred times.
pub fn fleet(question: &FleetQuestion, rules: Rules, progress: &mut dyn FnMut(f64)) -> FleetAnswer {
    let simulated = question.nodes.min(question.most_nodes).max(1);
    let scale = f64::from(question.nodes.max(1)) / f64::from(simulated);
    let mut world = World::new(START, Account::new(question.ec2, scale), question.seed);
    match rules {
        Rules::Stanchion => {
            let settled = settled(question, ours::Ours::new(question));
            let nodes = (0..simulated).map(|id| settled.of_instance(u64::from(id) ^ question.seed)).collect();
            run(question, nodes, &mut world, scale, progress)
        }
        Rules::AwsNode => {
            let settled = settled(question, aws_node::AwsNode::new(question));
            run(question, vec![settled; simulated as usize], &mut world, scale, progress)
        }
    }
}

/// A node that has been up for an hour, alone in its account, with its pods if the scenario begins with them.
fn settled<N: Node>(question: &FleetQuestion, mut node: N) -> N {
    let alone = Ec2Model { bucket: f64::MAX, latency: Duration::from_millis(1), attach: Duration::from_millis(1), ..question.ec2 };
    let mut world = World::new(0, Account::new(alone, 1.0), question.seed);
    world.at(0, 0, Event::Wake);
    if question.scenario != Scenario::Burst {
        for _ in 0..question.pods_per_node {
            world.at(60_000, 0, Event::Ask { since: 60_000 });
        }
    }
    while let Some(std::cmp::Reverse((at, _, _, event))) = world.queue.pop() {
        if at >= START {
            break;
        }
        world.now = at;
        node.handle(0, event, &mut world);
    }
    node
}

fn run<N: Node>(question: &FleetQuestion, mut nodes: Vec<N>, world: &mut World, scale: f64, progress: &mut dyn FnMut(f64)) -> FleetAnswer {
    let over = u64::try_from(question.over.as_millis()).unwrap_or(u64::MAX);
    for node in 0..nodes.len() as u32 {
        let phase = world.random.below(LOOP_PERIOD);
        world.at(phase, node, Event::Wake);
        for _ in 0..question.pods_per_node {
            let at = world.random.below(over.max(1));
            match question.scenario {
                Scenario::Burst => {
                    world.at(at, node, Event::Bound);
                    world.at(at + BIND_TO_ADD, node, Event::Ask { since: START + at + BIND_TO_ADD });
                }
                Scenario::Rolling => {
                    world.at(at, node, Event::End { replaced: true });
                    world.at(at + REPLACED_AFTER, node, Event::Bound);
                    let asks = at + REPLACED_AFTER + BIND_TO_ADD;
                    world.at(asks, node, Event::Ask { since: START + asks });
                }
                Scenario::Zero => world.at(at, node, Event::End { replaced: false }),
            }
        }
    }
    let pods = u64::from(question.pods_per_node) * nodes.len() as u64;
    world.asked = if question.scenario == Scenario::Zero { 0 } else { pods };
    let mut handled = 0u64;
    let mut rest_at = START + over + REST;
    while let Some(std::cmp::Reverse((at, _, node, event))) = world.queue.pop() {
        if world.waits.len() < world.asked as usize {
            rest_at = rest_at.max(at + REST);
        }
        rest_at = rest_at.max(world.last_done + REST);
        if at > START + LONGEST || at > rest_at {
            break;
        }
        world.now = at;
        nodes[node as usize].handle(node, event, world);
        handled += 1;
        if handled.is_multiple_of(4_096) {
            progress(((at - START) as f64 / (rest_at - START) as f64).min(1.0));
        }
    }
    answer(nodes.iter().map(Node::idle), nodes.len() as u32, world, scale)
}

fn answer(idle: impl Iterator<Item = (u64, u64)>, simulated_nodes: u32, world: &mut World, scale: f64) -> FleetAnswer {
    let scaled = |count: u64| (count as f64 * scale).round() as u64;
    let (addresses, enis) = idle.fold((0, 0), |sum, node| (sum.0 + node.0, sum.1 + node.1));
    let calls: BTreeMap<String, CallCount> = world
        .ec2
        .counts()
        .map(|(action, count)| (format!("{action:?}"), CallCount { sent: scaled(count.sent), throttled: scaled(count.throttled) }))
        .collect();
    world.waits.sort_unstable();
    let wait = |share: f64| {
        let rank = ((world.waits.len() as f64 * share).ceil() as usize).clamp(1, world.waits.len().max(1)) - 1;
        world.waits.get(rank).map_or(0.0, |ms| f64::from(*ms) / 1_000.0)
    };
    FleetAnswer {
        calls_total: calls.values().map(|count| count.sent).sum(),
        throttled_total: calls.values().map(|count| count.throttled).sum(),
        calls,
        pods: scaled(world.asked),
        unserved: scaled(world.asked.saturating_sub(world.waits.len() as u64)),
        wait_p50_s: wait(0.5),
        wait_p99_s: wait(0.99),
        wait_max_s: wait(1.0),
        idle_addresses: scaled(addresses),
        enis: scaled(enis),
        busy_s: (world.last_call - START) as f64 / 1_000.0,
        simulated_nodes,
    }
}

#[cfg(test)]
mod tests;
