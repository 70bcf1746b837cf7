#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stanchion_fuzz::branch_annotation(bytes));
