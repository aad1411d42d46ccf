//! The same program under its shorter name.

fn main() -> std::process::ExitCode {
    forgectl::main()
}
