#![no_main]
//! Files of torch.save: zip archive and pickle.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forge_tests::fuzzing::torch(bytes));
