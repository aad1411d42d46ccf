//! Cross-crate suites: see the files beside this one.
