//! The families on :61678/metrics.
//!
//! [`AWS_NODE`] are aws-node's, name for name and type for type, so that its dashboards, alerts and cni-metrics-helper read on.
//! Three of its families have nothing to tell here and are left out: [`ABSENT`].
//! [`OWN`] are ours. [`NODE`] are node_exporter's and cAdvisor's.

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
    STARTUP_SECONDS "awscni_ipamd_startup_duration_seconds" Histogram ["success", "with_api_server", "failure_reason"] "Time taken for ipamd to start, in seconds",
    NODE_INIT_SECONDS "awscni_ipamd_node_initialization_duration_seconds" Histogram ["success"] "Time taken to initialise the node's network, in seconds",
    CONNMARK_BACKEND "awscni_connmark_backend" Gauge ["backend"] "Active backend of the connmark rules",
    BUILD_INFO "awscni_build_info" Gauge ["version", "goversion"] "A metric with a constant '1' value labeled by version",
}

/// Families of aws-node without a counterpart: there is no library of AWS calls with errors of its own, and no rules for connection marks
/// apart from the nft table, which is healed as a whole.
pub const ABSENT: [&str; 2] = ["awscni_aws_utils_error_count", "awscni_connmark_reconcile_total"];

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
    HOST_HEALED "stanchion_host_healed_total" Counter ["what"] "Rules, routes, addresses, links, sysctls and nft tables that somebody else had changed and that were mended",
    POLICY_READY "stanchion_policy_ready" Gauge [] "1 when programs are loaded and the cluster's state is known",
    POLICY_ENDPOINTS "stanchion_policy_endpoints" Gauge ["isolation"] "Active pods by what isolates them",
    POLICY_FLOWS "stanchion_policy_flows" Gauge ["family"] "Entries of the flow tables",
    POLICY_FLOW_CAPACITY "stanchion_policy_flow_capacity" Gauge [] "Room of each flow table",
    POLICY_MAP_WRITES "stanchion_policy_map_writes_total" Counter [] "Writes of policy maps",
    POLICY_EVENTS_LOST "stanchion_policy_events_lost_total" Counter [] "Flow events that found the ring full",
    POLICY_TABLE_FULL "stanchion_policy_flow_table_full_total" Counter [] "Flows that found the flow table full",
    POLICY_POD_CAP "stanchion_policy_pod_flow_cap_total" Counter [] "Flows that found their pod at its cap",
    POLICY_NO_ENDPOINT "stanchion_policy_no_endpoint_packets_total" Counter [] "Packets dropped for want of an endpoint record",
    POLICY_NAMES_LOST "stanchion_policy_dns_answers_lost_total" Counter [] "DNS answers of pods with rules by name that found the ring full",
    FLOW_LOG_SENT "stanchion_flow_log_lines_sent_total" Counter [] "Lines of the flow log that its log group took",
    FLOW_LOG_DROPPED "stanchion_flow_log_lines_dropped_total" Counter [] "Lines of the flow log that were refused, or too old after an outage",
    FLOW_LOG_LOST "stanchion_flow_log_records_lost_total" Counter [] "Flow records that came faster than the flow log could gather them",
    POLICY_PACKETS "stanchion_policy_pod_packets_total" Counter ["namespace", "pod", "direction", "verdict"] "Packets judged, of pods with policies",
    POLICY_BYTES "stanchion_policy_pod_bytes_total" Counter ["namespace", "pod", "direction", "verdict"] "Bytes judged, of pods with policies",
    LOG_LINES "stanchion_log_lines_read_total" Counter [] "Lines read from log files",
    LOG_BYTES "stanchion_log_bytes_read_total" Counter [] "Bytes read from log files",
    LOG_EVENTS "stanchion_log_events_shipped_total" Counter [] "Log events that CloudWatch acknowledged",
    LOG_BILLED "stanchion_log_bytes_shipped_total" Counter [] "Bytes of them as CloudWatch bills",
    LOG_BATCHES "stanchion_log_batches_total" Counter [] "Batches acknowledged",
    LOG_RETRIES "stanchion_log_retries_total" Counter ["reason"] "Attempts after the first",
    LOG_LOST "stanchion_log_events_lost_total" Counter ["reason"] "Events that were not taken, by reason",
    LOG_LEFT_OUT "stanchion_log_lines_left_out_total" Counter ["reason"] "Lines that are not to be sent: of excluded pods, and empty ones that the layout has no message for",
    LOG_CHANGED "stanchion_log_events_changed_total" Counter ["how"] "Events that do not say what the file says: masked, end cut off, sent with the present time, cut for memory, not matched by their pod's parser",
    LOG_JOURNAL "stanchion_log_journal_entries_total" Counter ["outcome"] "Entries of the node's journal, read or not readable",
    LOG_QUOTA_WAITS "stanchion_log_quota_waits_total" Counter [] "Looks at files that read nothing because their namespace had used up its rate",
    LOG_TRUNCATIONS "stanchion_log_truncations_total" Counter [] "Files that became shorter than what was read of them",
    LOG_POSITION_ERRORS "stanchion_log_position_errors_total" Counter [] "Times that the positions file could not be written",
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
    KUBELET_READS "stanchion_kubelet_summaries_total" Counter ["outcome"] "Summaries asked of the kubelet",
    EXPORTER_READS "stanchion_exporter_reads_total" Counter ["outcome"] "Texts asked of the exporters of GPU and EBS drivers",
    OTLP_REQUESTS "stanchion_otlp_requests_total" Counter ["outcome"] "Requests to the OTLP receiver, sent or dropped",
    OTLP_REJECTED "stanchion_otlp_rejected_points_total" Counter [] "Data points that the OTLP receiver left out of requests it took",
    SCRAPES "stanchion_scrapes_total" Counter ["outcome"] "Pods asked for their Prometheus text",
    SCRAPE_DROPPED "stanchion_scrape_dropped_series_total" Counter [] "Series of pods that no document can hold: histograms, untyped, too many",
    STATSD_PACKETS "stanchion_statsd_packets_total" Counter [] "Statsd packets read",
    STATSD_LOST "stanchion_statsd_lost_total" Counter ["reason"] "Statsd lines that could not be read, and values that found no room",
    UNKNOWN_PODS "stanchion_metrics_unknown_pods" Gauge [] "Pod cgroups that no known pod owns",
    CAPPED "stanchion_metrics_capped_samples" Gauge [] "Samples left out of this text because a family has too many",
    ENA_EXCEEDED "stanchion_ena_allowance_exceeded_total" Counter ["interface", "allowance"] "Packets that the instance's allowance queued or dropped, by allowance",
    ENA_AVAILABLE "stanchion_ena_conntrack_allowance_available" Gauge ["interface"] "Connections that the instance may still track",
    PROCESS_CPU "process_cpu_seconds_total" Counter [] "Total user and system CPU time spent in seconds",
    PROCESS_RSS "process_resident_memory_bytes" Gauge [] "Resident memory size in bytes",
    PROCESS_VIRTUAL "process_virtual_memory_bytes" Gauge [] "Virtual memory size in bytes",
    PROCESS_FDS "process_open_fds" Gauge [] "Number of open file descriptors",
    PROCESS_THREADS "process_threads" Gauge [] "Number of threads",
    PROCESS_START "process_start_time_seconds" Gauge [] "Start time of the process since unix epoch in seconds",
}

families! {
    /// Families under the names of node_exporter and cAdvisor, for nodes that run neither; told on request. node_exporter's label `cpu` is
    /// not there: the counters are of all processors.
    NODE:
    NODE_LOAD1 "node_load1" Gauge [] "Load average over 1 minute",
    NODE_LOAD5 "node_load5" Gauge [] "Load average over 5 minutes",
    NODE_LOAD15 "node_load15" Gauge [] "Load average over 15 minutes",
    NODE_BOOT "node_boot_time_seconds" Gauge [] "Seconds since 1970 at boot",
    NODE_CPU "node_cpu_seconds_total" Counter ["mode"] "Processor time by what it was spent on",
    NODE_SWITCHES "node_context_switches_total" Counter [] "Context switches",
    NODE_FORKS "node_forks_total" Counter [] "Processes made",
    NODE_RUNNING "node_procs_running" Gauge [] "Runnable processes",
    NODE_BLOCKED "node_procs_blocked" Gauge [] "Processes that wait for I/O",
    NODE_MEMORY_TOTAL "node_memory_MemTotal_bytes" Gauge [] "Memory that the kernel manages",
    NODE_MEMORY_FREE "node_memory_MemFree_bytes" Gauge [] "Memory unused",
    NODE_MEMORY_AVAILABLE "node_memory_MemAvailable_bytes" Gauge [] "Memory obtainable without swapping",
    NODE_MEMORY_BUFFERS "node_memory_Buffers_bytes" Gauge [] "Block device cache",
    NODE_MEMORY_CACHED "node_memory_Cached_bytes" Gauge [] "Page cache",
    NODE_MEMORY_SWAP_TOTAL "node_memory_SwapTotal_bytes" Gauge [] "Swap space",
    NODE_MEMORY_SWAP_FREE "node_memory_SwapFree_bytes" Gauge [] "Swap space unused",
    NODE_MEMORY_DIRTY "node_memory_Dirty_bytes" Gauge [] "Memory to be written back",
    NODE_MEMORY_SLAB "node_memory_Slab_bytes" Gauge [] "Kernel objects",
    NODE_MEMORY_SLAB_RECLAIMABLE "node_memory_SReclaimable_bytes" Gauge [] "Kernel objects that can be reclaimed",
    NODE_FS_SIZE "node_filesystem_size_bytes" Gauge ["device"] "Size of the file system",
    NODE_FS_FREE "node_filesystem_free_bytes" Gauge ["device"] "Space unused",
    NODE_FS_AVAIL "node_filesystem_avail_bytes" Gauge ["device"] "Space obtainable without privilege",
    NODE_FS_FILES "node_filesystem_files" Gauge ["device"] "Inodes",
    NODE_FS_FILES_FREE "node_filesystem_files_free" Gauge ["device"] "Inodes unused",
    NODE_DISK_READS "node_disk_reads_completed_total" Counter ["device"] "Reads completed",
    NODE_DISK_READ_BYTES "node_disk_read_bytes_total" Counter ["device"] "Bytes read",
    NODE_DISK_READ_TIME "node_disk_read_time_seconds_total" Counter ["device"] "Time of reads, summed over them",
    NODE_DISK_WRITES "node_disk_writes_completed_total" Counter ["device"] "Writes completed",
    NODE_DISK_WRITTEN "node_disk_written_bytes_total" Counter ["device"] "Bytes written",
    NODE_DISK_WRITE_TIME "node_disk_write_time_seconds_total" Counter ["device"] "Time of writes, summed over them",
    NODE_DISK_NOW "node_disk_io_now" Gauge ["device"] "Requests under way",
    NODE_DISK_BUSY "node_disk_io_time_seconds_total" Counter ["device"] "Time with any request under way",
    NODE_NET_RX_BYTES "node_network_receive_bytes_total" Counter ["device"] "Bytes received",
    NODE_NET_RX_PACKETS "node_network_receive_packets_total" Counter ["device"] "Packets received",
    NODE_NET_RX_ERRORS "node_network_receive_errs_total" Counter ["device"] "Errors of receiving",
    NODE_NET_RX_DROPS "node_network_receive_drop_total" Counter ["device"] "Received packets dropped",
    NODE_NET_TX_BYTES "node_network_transmit_bytes_total" Counter ["device"] "Bytes sent",
    NODE_NET_TX_PACKETS "node_network_transmit_packets_total" Counter ["device"] "Packets sent",
    NODE_NET_TX_ERRORS "node_network_transmit_errs_total" Counter ["device"] "Errors of sending",
    NODE_NET_TX_DROPS "node_network_transmit_drop_total" Counter ["device"] "Packets to send dropped",
    CONTAINER_CPU "container_cpu_usage_seconds_total" Counter ["namespace", "pod", "container"] "Processor time used",
    CONTAINER_MEMORY "container_memory_working_set_bytes" Gauge ["namespace", "pod", "container"] "What could not be taken away without hurting",
    CONTAINER_USAGE "container_memory_usage_bytes" Gauge ["namespace", "pod", "container"] "All memory that is charged",
    CONTAINER_RSS "container_memory_rss" Gauge ["namespace", "pod", "container"] "Anonymous memory",
    CONTAINER_CACHE "container_memory_cache" Gauge ["namespace", "pod", "container"] "Page cache",
    CONTAINER_STARTED "container_start_time_seconds" Gauge ["namespace", "pod", "container"] "Seconds since 1970 at the start",
    CONTAINER_RX_BYTES "container_network_receive_bytes_total" Counter ["namespace", "pod", "interface"] "Bytes that the pod received",
    CONTAINER_RX_PACKETS "container_network_receive_packets_total" Counter ["namespace", "pod", "interface"] "Packets that the pod received",
    CONTAINER_RX_ERRORS "container_network_receive_errors_total" Counter ["namespace", "pod", "interface"] "Errors of receiving",
    CONTAINER_RX_DROPS "container_network_receive_packets_dropped_total" Counter ["namespace", "pod", "interface"] "Packets to the pod dropped",
    CONTAINER_TX_BYTES "container_network_transmit_bytes_total" Counter ["namespace", "pod", "interface"] "Bytes that the pod sent",
    CONTAINER_TX_PACKETS "container_network_transmit_packets_total" Counter ["namespace", "pod", "interface"] "Packets that the pod sent",
    CONTAINER_TX_ERRORS "container_network_transmit_errors_total" Counter ["namespace", "pod", "interface"] "Errors of sending",
    CONTAINER_TX_DROPS "container_network_transmit_packets_dropped_total" Counter ["namespace", "pod", "interface"] "Packets of the pod dropped",
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
        let absent = |line: &str| ABSENT.iter().any(|name| line.split(' ').next() == Some(name));
        assert_eq!(UPSTREAM.lines().filter(|line| absent(line)).count(), ABSENT.len());
        let theirs: BTreeSet<String> = UPSTREAM.lines().filter(|line| !absent(line)).map(str::to_owned).collect();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn own_names_follow_the_conventions() {
        let mut seen = BTreeSet::new();
        for family in AWS_NODE.iter().chain(OWN).chain(NODE) {
            assert!(seen.insert(family.name), "{} twice", family.name);
            assert!(family.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{}", family.name);
            assert!(!family.help.is_empty() && !family.help.ends_with('.'), "{}", family.name);
        }
        for family in OWN.iter().chain(NODE) {
            assert_eq!(family.kind == Kind::Counter, family.name.ends_with("_total"), "{}", family.name);
        }
    }
}
