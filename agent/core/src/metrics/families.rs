//! The families on :61678/metrics.
//!
//! [`AWS_NODE`] are aws-node's, name for name and type for type, so that its dashboards, alerts and cni-metrics-helper read on.
//! [`OWN`] are ours.

use super::exposition::{Family, Kind};

macro_rules! families {
    ($(#[$doc:meta])* $table:ident: $($constant:ident $name:literal $kind:ident [$($label:literal),*] $help:literal,)*) => {
        $(#[doc = $help] pub static $constant: Family = Family { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };)*
        $(#[$doc])*
        pub static $table: &[&Family] = &[$(&$constant,)*];
    };
}

families! {
    /// aws-node's families, as its ipamd registers them.
    AWS_NODE:
    ENI_MAX "awscni_eni_max" Gauge [] "The maximum number of ENIs that can be attached to the instance, accounting for unmanaged ENIs",
    IP_MAX "awscni_ip_max" Gauge [] "The maximum number of IP addresses that can be allocated to the instance",
    ENI_ALLOCATED "awscni_eni_allocated" Gauge [] "The number of ENIs allocated",
    TOTAL_IPS "awscni_total_ip_addresses" Gauge [] "The total number of IP addresses",
    ASSIGNED_IPS "awscni_assigned_ip_addresses" Gauge [] "The number of IP addresses assigned to pods",
    TOTAL_PREFIXES "awscni_total_ipv4_prefixes" Gauge [] "The total number of IPv4 prefixes",
    ASSIGNED_PER_CIDR "awscni_assigned_ip_per_cidr" Gauge ["cidr"] "The total number of IP addresses assigned per cidr",
    ASSIGNED_PER_ENI "awscni_assigned_ip_per_eni" Gauge ["eni"] "The number of allocated ips partitioned by eni",
    ACTION_IN_PROGRESS "awscni_ipamd_action_inprogress" Gauge ["fn"] "The number of ipamd actions in progress",
    IPAMD_ERRORS "awscni_ipamd_error_count" Counter ["fn"] "The number of errors encountered in ipamd",
    POD_ENI_ERRORS "awscni_pod_eni_error_count" Counter ["fn"] "The number of errors encountered for pod ENIs",
    RECONCILES "awscni_reconcile_count" Counter ["fn"] "The number of times ipamd reconciles on ENIs and IP/Prefix addresses",
    EC2_REQUESTS "awscni_ec2api_req_count" Counter ["fn"] "The number of requests made to EC2 APIs by CNI",
    EC2_ERRORS "awscni_ec2api_error_count" Counter ["fn"] "The number of failed EC2 APIs requests",
    ADD_REQUESTS "awscni_add_ip_req_count" Counter [] "The number of add IP address requests",
    DEL_REQUESTS "awscni_del_ip_req_count" Counter ["reason"] "The number of delete IP address requests",
    NO_AVAILABLE "awscni_no_available_ip_addresses" Counter [] "The number of pod IP assignments that fail due to no available IP addresses",
    FORCE_REMOVED_ENIS "awscni_force_removed_enis" Counter [] "The number of ENIs force removed while they had assigned pods",
    FORCE_REMOVED_IPS "awscni_force_removed_ips" Counter [] "The number of IPs force removed while they had assigned pods",
    API_LATENCY "awscni_aws_api_latency_ms" Summary ["api", "error", "status"] "AWS API call latency in ms",
    API_ERRORS "awscni_aws_api_error_count" Counter ["api", "error"] "The number of times AWS API returns an error",
    UTILS_ERRORS "awscni_aws_utils_error_count" Counter ["fn", "error"] "The number of errors not handled in awsutils library",
    STARTUP_SECONDS "awscni_ipamd_startup_duration_seconds" Histogram ["success", "with_api_server", "failure_reason"] "Time taken for ipamd to start, in seconds",
    NODE_INIT_SECONDS "awscni_ipamd_node_initialization_duration_seconds" Histogram ["success"] "Time taken to initialise the node's network, in seconds",
    CONNMARK_BACKEND "awscni_connmark_backend" Gauge ["backend"] "Active backend of the connmark rules",
    CONNMARK_RECONCILES "awscni_connmark_reconcile_total" Counter ["result"] "Reconciliations of the connmark rules",
    BUILD_INFO "awscni_build_info" Gauge ["version", "goversion"] "A metric with a constant '1' value labeled by version",
}

families! {
    /// Our own families.
    OWN:
    IPAM_READY "stanchion_ipam_ready" Gauge [] "1 when an ADD could succeed now",
    IPAM_FREE "stanchion_ipam_free_ip_addresses" Gauge ["network_card"] "Addresses neither assigned nor cooling",
    IPAM_COOLING "stanchion_ipam_cooling_ip_addresses" Gauge ["network_card"] "Addresses released less than the cool-down ago",
    IPAM_WAITING "stanchion_ipam_waiting_requests" Gauge [] "ADD requests that wait for an address",
    IPAM_BOUND "stanchion_ipam_bound_pods" Gauge [] "Pods bound to this node that have not asked for an address yet",
    IPAM_WAITED "stanchion_ipam_waited_requests_total" Counter [] "ADD requests that had to wait for EC2",
    IPAM_CHECKPOINTS "stanchion_ipam_checkpoint_writes_total" Counter [] "Writes of the address checkpoint",
    POLICY_READY "stanchion_policy_ready" Gauge [] "1 when programs are loaded and the cluster's state is known",
    POLICY_ENDPOINTS "stanchion_policy_endpoints" Gauge ["isolation"] "Active pods by what isolates them",
    POLICY_FLOWS "stanchion_policy_flows" Gauge ["family"] "Entries of the flow tables",
    POLICY_FLOW_CAPACITY "stanchion_policy_flow_capacity" Gauge [] "Room of each flow table",
    POLICY_MAP_WRITES "stanchion_policy_map_writes_total" Counter [] "Writes of policy maps",
    POLICY_EVENTS_LOST "stanchion_policy_events_lost_total" Counter [] "Flow events that found the ring full",
    POLICY_TABLE_FULL "stanchion_policy_flow_table_full_total" Counter [] "Flows that found the flow table full",
    POLICY_POD_CAP "stanchion_policy_pod_flow_cap_total" Counter [] "Flows that found their pod at its cap",
    POLICY_NO_ENDPOINT "stanchion_policy_no_endpoint_packets_total" Counter [] "Packets dropped for want of an endpoint record",
    POLICY_PACKETS "stanchion_policy_pod_packets_total" Counter ["namespace", "pod", "direction", "verdict"] "Packets judged, of pods with policies",
    POLICY_BYTES "stanchion_policy_pod_bytes_total" Counter ["namespace", "pod", "direction", "verdict"] "Bytes judged, of pods with policies",
    LOG_LINES "stanchion_log_lines_read_total" Counter [] "Lines read from log files",
    LOG_BYTES "stanchion_log_bytes_read_total" Counter [] "Bytes read from log files",
    LOG_EVENTS "stanchion_log_events_shipped_total" Counter [] "Log events that CloudWatch acknowledged",
    LOG_BILLED "stanchion_log_bytes_shipped_total" Counter [] "Bytes of them as CloudWatch bills",
    LOG_BATCHES "stanchion_log_batches_total" Counter [] "Batches acknowledged",
    LOG_RETRIES "stanchion_log_retries_total" Counter ["reason"] "Attempts after the first",
    LOG_LOST "stanchion_log_events_lost_total" Counter ["reason"] "Events that were not taken, by reason",
    LOG_FILES "stanchion_log_files" Gauge [] "Open log files",
    LOG_LAG_BYTES "stanchion_log_lag_bytes" Gauge [] "Bytes in log files that are not acknowledged",
    LOG_LAG_SECONDS "stanchion_log_lag_seconds" Gauge [] "The longest time that a file waits for acknowledgement",
    LOG_MEMORY "stanchion_log_memory_bytes" Gauge [] "Encoded bytes in memory that are not acknowledged",
    LOG_HELD "stanchion_log_held_bytes" Gauge [] "Disk space of deleted files that are still read",
    LOG_EVICTED "stanchion_log_evicted_bytes_total" Counter [] "Bytes of rotated files given up because they took more disk than allowed",
    LOG_FILE_ERRORS "stanchion_log_file_errors_total" Counter [] "Errors of opening and reading log files",
    DOCUMENTS "stanchion_metrics_documents_total" Counter ["outcome"] "Container Insights documents, sent or dropped",
    DOCUMENT_RETRIES "stanchion_metrics_document_retries_total" Counter [] "Requests for documents that were tried again",
    TICK_SECONDS "stanchion_metrics_tick_cpu_seconds" Gauge [] "CPU time of the last metric tick",
    TICKS "stanchion_metrics_ticks_total" Counter [] "Metric ticks that gave samples",
    TICK_ERRORS "stanchion_metrics_tick_errors_total" Counter [] "Metric ticks that could not read the kernel's figures",
    UNKNOWN_PODS "stanchion_metrics_unknown_pods" Gauge [] "Pod cgroups that no known pod owns",
    CAPPED "stanchion_metrics_capped_samples" Gauge [] "Samples left out of this text because a family has too many",
    ENA_EXCEEDED "stanchion_ena_allowance_exceeded_total" Counter ["interface", "allowance"] "Packets that the instance's allowance queued or dropped, by allowance",
    ENA_AVAILABLE "stanchion_ena_conntrack_allowance_available" Gauge ["interface"] "Connections that the instance may still track",
    NODE_LOAD1 "node_load1" Gauge [] "Load average over 1 minute",
    NODE_LOAD5 "node_load5" Gauge [] "Load average over 5 minutes",
    NODE_LOAD15 "node_load15" Gauge [] "Load average over 15 minutes",
    NODE_MEMORY_TOTAL "node_memory_MemTotal_bytes" Gauge [] "Memory that the kernel manages",
    CONTAINER_MEMORY "container_memory_working_set_bytes" Gauge ["namespace", "pod", "container"] "What could not be taken away without hurting",
    CONTAINER_RSS "container_memory_rss" Gauge ["namespace", "pod", "container"] "Anonymous memory",
    NODE_FS_SIZE "node_filesystem_size_bytes" Gauge ["device"] "Size of the file system",
    NODE_FS_AVAIL "node_filesystem_avail_bytes" Gauge ["device"] "Space obtainable without privilege",
    PROCESS_CPU "process_cpu_seconds_total" Counter [] "Total user and system CPU time spent in seconds",
    PROCESS_RSS "process_resident_memory_bytes" Gauge [] "Resident memory size in bytes",
    PROCESS_VIRTUAL "process_virtual_memory_bytes" Gauge [] "Virtual memory size in bytes",
    PROCESS_FDS "process_open_fds" Gauge [] "Number of open file descriptors",
    PROCESS_THREADS "process_threads" Gauge [] "Number of threads",
    PROCESS_START "process_start_time_seconds" Gauge [] "Start time of the process since unix epoch in seconds",
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// aws-node's registrations: name, type, labels.
    const UPSTREAM: &str = "\
awscni_eni_max gauge
awscni_ip_max gauge
awscni_eni_allocated gauge
awscni_total_ip_addresses gauge
awscni_assigned_ip_addresses gauge
awscni_total_ipv4_prefixes gauge
awscni_assigned_ip_per_cidr gauge cidr
awscni_assigned_ip_per_eni gauge eni
awscni_ipamd_action_inprogress gauge fn
awscni_ipamd_error_count counter fn
awscni_pod_eni_error_count counter fn
awscni_reconcile_count counter fn
awscni_ec2api_req_count counter fn
awscni_ec2api_error_count counter fn
awscni_add_ip_req_count counter
awscni_no_available_ip_addresses counter
awscni_force_removed_enis counter
awscni_force_removed_ips counter
awscni_del_ip_req_count counter reason
awscni_aws_api_latency_ms summary api,error,status
awscni_aws_api_error_count counter api,error
awscni_aws_utils_error_count counter fn,error
awscni_ipamd_startup_duration_seconds histogram success,with_api_server,failure_reason
awscni_ipamd_node_initialization_duration_seconds histogram success
awscni_connmark_backend gauge backend
awscni_connmark_reconcile_total counter result
awscni_build_info gauge version,goversion";

    #[test]
    fn names_types_and_labels_are_aws_nodes() {
        let ours: BTreeSet<String> = AWS_NODE
            .iter()
            .map(|family| format!("{} {} {}", family.name, family.kind.name(), family.labels.join(",")).trim_end().to_owned())
            .collect();
        let theirs: BTreeSet<String> = UPSTREAM.lines().map(str::to_owned).collect();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn own_names_follow_the_conventions() {
        let mut seen = BTreeSet::new();
        for family in AWS_NODE.iter().chain(OWN) {
            assert!(seen.insert(family.name), "{} twice", family.name);
            assert!(family.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{}", family.name);
            assert!(!family.help.is_empty() && !family.help.ends_with('.'), "{}", family.name);
        }
        for family in OWN {
            assert_eq!(family.kind == Kind::Counter, family.name.ends_with("_total"), "{}", family.name);
        }
    }
}
