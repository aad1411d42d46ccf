#![no_main]
//! Events from worker to gateway.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::engine_reply(bytes));
