//! How fast a namespace's logs are read. A quota delays and never drops: what is not read yet waits in its file, so that a noisy
//! pod delays only itself and its neighbours of the namespace, and these take turns.

use std::collections::BTreeMap;

use super::names::glob;

/// A rule; the first that matches a namespace is its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Quota {
    /// Namespaces, as a glob. Each namespace that matches has the whole rate for itself.
    pub namespace: String,
    /// Bytes of log files in a second; `None` for no bound.
    pub bytes_per_second: Option<u64>,
    /// Lines in a second.
    pub lines_per_second: Option<u64>,
}

/// What a namespace may still read.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rule: usize,
    /// Below zero after a read that was larger than what was left: paid back before the next.
    bytes: f64,
    lines: f64,
    filled_ms: i64,
}

/// The buckets of all namespaces.
#[derive(Clone, Debug, Default)]
pub struct Quotas {
    rules: Vec<Quota>,
    buckets: BTreeMap<String, Bucket>,
}

impl Quotas {
    /// With all buckets full: a second's worth.
    pub fn new(rules: Vec<Quota>) -> Self {
        Self { rules, ..Self::default() }
    }

    /// When the namespace may read again, in milliseconds of the clock of `now_ms`; `now_ms` or before is at once.
    pub fn ready_at(&mut self, namespace: &str, now_ms: i64) -> i64 {
        let rules = &self.rules;
        let Some(rule) = rules.iter().position(|rule| glob(&rule.namespace, namespace)) else { return now_ms };
        let quota = &rules[rule];
        let full = |rate: Option<u64>| rate.map_or(f64::INFINITY, |rate| rate as f64);
        let (bytes, lines) = (full(quota.bytes_per_second), full(quota.lines_per_second));
        let bucket = match self.buckets.get_mut(namespace) {
            Some(bucket) => bucket,
            None => self.buckets.entry(namespace.to_owned()).or_insert(Bucket { rule, bytes, lines, filled_ms: now_ms }),
        };
        let seconds = (now_ms - bucket.filled_ms).max(0) as f64 / 1000.0;
        let fill = |level: f64, rate: f64| if rate.is_finite() { (level + rate * seconds).min(rate) } else { rate };
        (bucket.bytes, bucket.lines) = (fill(bucket.bytes, bytes), fill(bucket.lines, lines));
        bucket.filled_ms = now_ms;
        let wait = |level: f64, rate: f64| if level > 0.0 { 0.0 } else { (1.0 - level) / rate * 1000.0 };
        now_ms + wait(bucket.bytes, bytes).max(wait(bucket.lines, lines)).ceil() as i64
    }

    /// Takes what was read from the namespace's bucket.
    pub fn spend(&mut self, namespace: &str, bytes: u64, lines: u64) {
        if let Some(bucket) = self.buckets.get_mut(namespace) {
            bucket.bytes -= bytes as f64;
            bucket.lines -= lines as f64;
        }
    }

    /// Most bytes to read at once, so that the namespace's pods take turns; `most` where there is no bound.
    pub fn portion(&self, namespace: &str, most: usize) -> usize {
        let Some(bucket) = self.buckets.get(namespace) else { return most };
        let quota = &self.rules[bucket.rule];
        let bytes = quota.bytes_per_second.into_iter().chain(quota.lines_per_second.map(|lines| lines.saturating_mul(128))).min();
        // Not below the longest line of a runtime.
        bytes.map_or(most, |bytes| usize::try_from(bytes / 8).unwrap_or(most).clamp((20 << 10).min(most), most))
    }

    /// Nothing is bounded.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(namespace: &str, bytes: Option<u64>, lines: Option<u64>) -> Quota {
        Quota { namespace: namespace.to_owned(), bytes_per_second: bytes, lines_per_second: lines }
    }

    proptest! {
        /// Reads of any size as soon as they are allowed: over any time the rate holds but for a second's worth and the last read.
        #[test]
        fn the_rate_holds(reads in proptest::collection::vec((1_u64..60_000, 0_i64..400), 1..100), rate in 1_000_u64..1_000_000) {
            let mut quotas = Quotas::new(vec![rule("*", Some(rate), None)]);
            let (mut now, mut read, mut last) = (0, 0, 0);
            for (bytes, idle) in reads {
                now = quotas.ready_at("shop", now + idle).max(now + idle);
                prop_assert!(quotas.ready_at("shop", now) <= now, "what was promised holds");
                quotas.spend("shop", bytes, 1);
                read += bytes;
                last = bytes;
            }
            let allowed = rate as f64 * (now as f64 / 1000.0 + 1.0) + last as f64 + 1.0;
            prop_assert!(read as f64 <= allowed, "{} of {}", read, allowed);
        }
    }

    #[test]
    fn namespaces_do_not_share_and_the_first_rule_counts() {
        let mut quotas = Quotas::new(vec![rule("kube-*", None, None), rule("*", Some(1000), Some(10))]);
        assert_eq!(quotas.ready_at("kube-system", 0), 0);
        quotas.spend("kube-system", 1 << 40, 1 << 40);
        assert_eq!(quotas.ready_at("kube-system", 0), 0, "no bound");
        assert_eq!(quotas.ready_at("a", 0), 0);
        quotas.spend("a", 3000, 1);
        assert_eq!(quotas.ready_at("b", 0), 0, "another namespace is not delayed");
        assert!(quotas.ready_at("a", 0) >= 2000);
        quotas.spend("b", 1, 30);
        assert!((2000..2200).contains(&quotas.ready_at("b", 0)), "lines count too");
        assert!(Quotas::default().is_empty() && Quotas::default().ready_at("a", 5) == 5);
    }

    #[test]
    fn portions_leave_room_for_neighbours() {
        let mut quotas = Quotas::new(vec![rule("slow", Some(400_000), None), rule("fast", Some(1 << 30), None)]);
        quotas.ready_at("slow", 0);
        quotas.ready_at("fast", 0);
        assert_eq!(
            (quotas.portion("slow", 262_144), quotas.portion("fast", 262_144), quotas.portion("free", 262_144)),
            (50_000, 262_144, 262_144)
        );
    }
}
