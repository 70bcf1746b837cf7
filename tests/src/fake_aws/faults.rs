//! Faults by script and by seed, and the token buckets.

use std::collections::BTreeMap;
use std::time::Duration;

/// An error reply: a code and a text as the service words them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// `InvalidParameterValue`, `ThrottlingException` ...
    pub code: String,
    /// The text.
    pub message: String,
}

impl ApiError {
    /// A client error (400).
    pub fn bad(code: &str, message: impl Into<String>) -> Self {
        Self { status: 400, code: code.to_owned(), message: message.into() }
    }

    /// An error with another status.
    pub fn with_status(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.to_owned(), message: message.into() }
    }
}

/// What goes wrong with a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is done; this is the reply.
    Error(ApiError),
    /// It is done, but the connection closes without a reply.
    LoseReply,
    /// Nothing is done and the connection closes.
    DropRequest,
    /// It is done, and the reply comes this much later.
    Delay(Duration),
    /// It is done, but the reply is this, with status 200.
    Garbage(String),
    /// It is done, and the reply's body is damaged on its way, by this seed.
    Damage(u64),
}

/// A scripted fault: the next `times` calls of an action that come after `after` others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `CreateNetworkInterface`, `PutLogEvents`, `imds:/latest/meta-data/mac`; `*` ends a prefix (`imds:*`, `*`).
    pub action: String,
    /// Calls of the action that pass first.
    pub after: u64,
    /// How many calls are hit; `u64::MAX` for all.
    pub times: u64,
    /// What happens.
    pub effect: Effect,
}

impl Fault {
    /// The next call of the action is hit.
    pub fn once(action: &str, effect: Effect) -> Self {
        Self::times(action, 1, effect)
    }

    /// The next `times` calls are hit.
    pub fn times(action: &str, times: u64, effect: Effect) -> Self {
        Self { action: action.to_owned(), after: 0, times, effect }
    }

    /// Every call is hit, until [`super::Cloud::clear_faults`].
    pub fn always(action: &str, effect: Effect) -> Self {
        Self::times(action, u64::MAX, effect)
    }

    fn matches(&self, action: &str) -> bool {
        match self.action.strip_suffix('*') {
            Some(prefix) => action.starts_with(prefix),
            None => self.action == action,
        }
    }
}

/// Random faults: probabilities in 1/1000 a call, drawn from a seed in call order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chaos {
    /// Of the generator.
    pub seed: u64,
    /// `RequestLimitExceeded` or `ThrottlingException`.
    pub throttle: u32,
    /// `InternalError` (500).
    pub internal_error: u32,
    /// Done, no reply.
    pub lose_reply: u32,
    /// Not done, no reply.
    pub drop_request: u32,
    /// Up to `max_delay` late.
    pub delay: u32,
    /// Longest delay.
    pub max_delay: Duration,
}

/// A token bucket: EC2's throttling page gives a size and a refill rate an action.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// Most tokens it holds.
    pub size: f64,
    /// Tokens a second.
    pub per_second: f64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    script: Vec<Fault>,
    chaos: Chaos,
    draws: u64,
    buckets: BTreeMap<String, (Bucket, f64, Duration)>,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.script.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.script.clear();
        self.chaos = Chaos::default();
    }

    pub(super) fn set_chaos(&mut self, chaos: Chaos) {
        self.chaos = chaos;
        self.draws = 0;
    }

    pub(super) fn set_bucket(&mut self, action: &str, bucket: Bucket, now: Duration) {
        self.buckets.insert(action.to_owned(), (bucket, bucket.size, now));
    }

    /// Takes a token of the action; false when it is throttled.
    pub(super) fn admit(&mut self, action: &str, now: Duration) -> bool {
        let Some((bucket, tokens, last)) = self.buckets.get_mut(action) else { return true };
        *tokens = (*tokens + bucket.per_second * now.saturating_sub(*last).as_secs_f64()).min(bucket.size);
        *last = now;
        let admitted = *tokens >= 1.0;
        if admitted {
            *tokens -= 1.0;
        }
        admitted
    }

    /// What happens to this call; the script goes before chance.
    pub(super) fn draw(&mut self, action: &str, throttled: impl FnOnce() -> ApiError) -> Option<Effect> {
        if let Some(index) = self.script.iter().position(|fault| fault.matches(action)) {
            let fault = &mut self.script[index];
            if fault.after > 0 {
                fault.after -= 1;
            } else {
                let effect = fault.effect.clone();
                fault.times = if fault.times == u64::MAX { u64::MAX } else { fault.times - 1 };
                if fault.times == 0 {
                    self.script.remove(index);
                }
                return Some(effect);
            }
        }
        let chaos = self.chaos;
        let total = chaos.throttle + chaos.internal_error + chaos.lose_reply + chaos.drop_request + chaos.delay;
        if total == 0 {
            return None;
        }
        self.draws += 1;
        let drawn = mix(chaos.seed, self.draws);
        let mut rest = (drawn % 1000) as u32;
        let mut hit = |share: u32| {
            let hit = rest < share;
            rest = if hit { u32::MAX } else { rest - share };
            hit
        };
        if hit(chaos.throttle) {
            Some(Effect::Error(throttled()))
        } else if hit(chaos.internal_error) {
            Some(Effect::Error(ApiError::with_status(500, "InternalError", "An internal error has occurred")))
        } else if hit(chaos.lose_reply) {
            Some(Effect::LoseReply)
        } else if hit(chaos.drop_request) {
            Some(Effect::DropRequest)
        } else if hit(chaos.delay) {
            let nanos = u64::try_from(chaos.max_delay.as_nanos()).unwrap_or(u64::MAX).max(1);
            Some(Effect::Delay(Duration::from_nanos(mix(drawn, 1) % nanos)))
        } else {
            None
        }
    }
}

/// SplitMix64 of two numbers: the same on every machine and version, so that a printed seed stays good.
pub(super) fn mix(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttled() -> ApiError {
        ApiError::bad("RequestLimitExceeded", "Request limit exceeded.")
    }

    #[test]
    fn a_bucket_empties_and_refills() {
        let mut faults = Faults::default();
        faults.set_bucket("A", Bucket { size: 2.0, per_second: 1.0 }, Duration::ZERO);
        let admitted = |faults: &mut Faults, ms| faults.admit("A", Duration::from_millis(ms));
        assert!(admitted(&mut faults, 0) && admitted(&mut faults, 0));
        assert!(!admitted(&mut faults, 500));
        assert!(admitted(&mut faults, 1_000));
        assert!(admitted(&mut faults, 60_000) && admitted(&mut faults, 60_000) && !admitted(&mut faults, 60_000));
        assert!(faults.admit("B", Duration::ZERO), "an action without a bucket is free");
    }

    #[test]
    fn the_script_counts_its_calls() {
        let mut faults = Faults::default();
        faults.add(Fault { action: "A".into(), after: 1, times: 2, effect: Effect::LoseReply });
        let drawn: Vec<_> = (0..4).map(|_| faults.draw("A", throttled)).collect();
        assert_eq!(drawn, [None, Some(Effect::LoseReply), Some(Effect::LoseReply), None]);
        faults.add(Fault::always("imds:*", Effect::DropRequest));
        assert_eq!(faults.draw("imds:/x", throttled), Some(Effect::DropRequest));
        assert_eq!(faults.draw("A", throttled), None);
    }

    #[test]
    fn chaos_follows_its_seed_and_its_shares() {
        let run = |seed| {
            let mut faults = Faults::default();
            faults.set_chaos(Chaos { seed, throttle: 200, lose_reply: 100, ..Chaos::default() });
            (0..1000).map(|_| faults.draw("A", throttled)).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        let lost = run(7).iter().filter(|e| **e == Some(Effect::LoseReply)).count();
        assert!((60..140).contains(&lost), "{lost} of 1000");
    }
}
