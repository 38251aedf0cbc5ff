//! `user-factory`: the factory's unprivileged part and the operator's command. The command line is parsed in
//! `command`; each command reads what it needs and calls the library. Nothing else belongs here.
#![forbid(unsafe_code)]

mod command;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use command::{
    Arguments, Command, DONE, FAILED, FileSearch, NOT_CONFIGURED, OutputFormat, ask, check, devices, exit,
    generate, manual, print_error, residue, selftest, serve, shutdown,
};
use supervisor::control::api::Drain;

fn main() -> ExitCode {
    exit(run(Arguments::parse().command))
}

fn run(command: Command) -> u8 {
    match command {
        Command::Serve {
            config,
            at,
            allow_root,
            log_level,
        } => exit_status(serve::serve(config, &at.root, allow_root, log_level)),
        Command::Check {
            config,
            online,
            all,
            search,
            at,
        } => {
            let checked = check::check(&config, online || all, &at.root);
            match all {
                true => checked.max(of_this_host(&at.root, search)),
                false => checked,
            }
        }
        Command::Status { at, output, watch } => {
            ask::with_client(&at, async |factory| ask::status(factory, output, watch).await)
        }
        Command::Workers { at, output } => {
            ask::with_client(&at, async |factory| ask::workers(factory, output).await)
        }
        Command::Show { worker, at, output } => {
            ask::with_client(&at, async |factory| ask::show(factory, worker, output).await)
        }
        Command::Egress { slot, at, output } => {
            ask::with_client(&at, async |factory| ask::egress(factory, slot, output).await)
        }
        Command::Devices { at, output, watch } => devices::devices(&at, output, watch),
        Command::Logs { worker, follow, at } => {
            ask::with_client(&at, async |factory| ask::logs(factory, worker, follow).await)
        }
        Command::Drain {
            slot,
            wait,
            reason,
            until,
            at_shutdown,
            at,
        } => {
            if at_shutdown {
                return shutdown::wait(&at);
            }
            let request = Drain { slot, reason, until };
            ask::with_client(&at, async |factory| ask::drain(factory, request, wait).await)
        }
        Command::Resume { slot, at } => {
            ask::with_client(&at, async |factory| ask::resume(factory, slot).await)
        }
        Command::Kill { worker, at } => {
            ask::with_client(&at, async |factory| ask::kill(factory, worker).await)
        }
        Command::Destroy { worker, yes, at } => {
            ask::with_client(&at, async |factory| ask::destroy(factory, worker, yes).await)
        }
        Command::Reload { at } => ask::with_client(&at, async |factory| ask::reload(factory).await),
        Command::Shell { worker, at } => {
            let arguments = [
                "shell".into(),
                "--root".into(),
                at.root.into_os_string(),
                worker.to_string().into(),
            ];
            manual::exec(arguments)
        }
        Command::Run { slot, at, command } => {
            let mut arguments: Vec<OsString> = vec!["run".into(), "--root".into(), at.root.into_os_string()];
            arguments.extend(
                slot.into_iter()
                    .flat_map(|slot| ["--slot".into(), slot.to_string().into()]),
            );
            arguments.push("--".into());
            arguments.extend(command);
            manual::exec(arguments)
        }
        Command::Residue { at, output, search } => residue::residue(&at.root, search.pace(), output),
        Command::Selftest {
            slot,
            at_start,
            at,
            output,
        } => match at_start {
            true => selftest::run_at_start(&at.root, output),
            false => selftest::selftest(&at.root, slot, output),
        },
        Command::Generate { what } => exit_status(generate::generate(what)),
    }
}

/// What `check --all` does beside `check`.
fn of_this_host(root: &Path, search: FileSearch) -> u8 {
    let output = OutputFormat { json: false };
    let tested = selftest::selftest(root, None, output);
    tested.max(residue::residue(root, search.pace(), output))
}

fn exit_status<E: Into<anyhow::Error>>(result: Result<(), E>) -> u8 {
    match result {
        Ok(()) => DONE,
        Err(error) => {
            let error = error.into();
            print_error(&format!("user-factory: {error:#}"));
            match error.is::<serve::ConfigurationError>() {
                true => NOT_CONFIGURED,
                false => FAILED,
            }
        }
    }
}
