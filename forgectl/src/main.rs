//! The `forgectl` program.

fn main() -> std::process::ExitCode {
    forgectl::main()
}
