//! The program `user-factory-helper`: see the library's page.

fn main() -> std::process::ExitCode {
    helper::main()
}
