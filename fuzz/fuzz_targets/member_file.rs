#![no_main]
//! member.json of a coordinator.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::member_file(bytes));
