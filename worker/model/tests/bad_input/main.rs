//! Damaged, hostile and mistaken models, by format: each gets a typed error that names what is wrong, and never a panic.

#[path = "../common/mod.rs"]
mod common;

mod folders;
mod gguf;
mod options;
mod safetensors;
mod torch;
