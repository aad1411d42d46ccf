#![no_main]
//! What a worker says in its session.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::node_session(bytes));
