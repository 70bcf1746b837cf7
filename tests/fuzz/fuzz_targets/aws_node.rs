#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stanchion_fuzz::aws_node_daemon_set(bytes));
