//! `user-factory`: the factory's unprivileged half and the operator's command. What is typed is read in
//! `command`; each command reads what it needs and calls the library. Nothing else belongs here.
#![forbid(unsafe_code)]

mod command;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use command::{
    Arguments, Command, DONE, FAILED, NOT_CONFIGURED, ask, check, exit, generate, root, say_error, serve,
};

fn main() -> ExitCode {
    exit(run(Arguments::parse().command))
}

fn run(command: Command) -> u8 {
    match command {
        Command::Serve {
            config,
            there,
            allow_root,
            log_level,
        } => or_say(serve::serve(config, &there.root, allow_root, log_level)),
        Command::Check {
            config,
            online,
            there,
        } => check::check(&config, online, &there.root),
        Command::Status { there, how, watch } => {
            ask::ask(&there, async |factory| ask::status(factory, how, watch).await)
        }
        Command::Workers { there, how } => ask::ask(&there, async |factory| ask::workers(factory, how).await),
        Command::Show { worker, there, how } => {
            ask::ask(&there, async |factory| ask::show(factory, worker, how).await)
        }
        Command::Logs {
            worker,
            follow,
            there,
        } => ask::ask(&there, async |factory| ask::logs(factory, worker, follow).await),
        Command::Drain { slot, wait, there } => {
            ask::ask(&there, async |factory| ask::drain(factory, slot, wait).await)
        }
        Command::Resume { slot, there } => ask::ask(&there, async |factory| ask::resume(factory, slot).await),
        Command::Kill { worker, there } => ask::ask(&there, async |factory| ask::kill(factory, worker).await),
        Command::Destroy { worker, yes, there } => {
            ask::ask(&there, async |factory| ask::destroy(factory, worker, yes).await)
        }
        Command::Reload { there } => ask::ask(&there, async |factory| ask::reload(factory).await),
        Command::Shell { worker, there } => {
            let words = [
                "shell".into(),
                "--root".into(),
                there.root.into_os_string(),
                worker.to_string().into(),
            ];
            root::become_manual(words)
        }
        Command::Run { slot, there, command } => {
            let mut words: Vec<OsString> = vec!["run".into(), "--root".into(), there.root.into_os_string()];
            words.extend(
                slot.into_iter()
                    .flat_map(|slot| ["--slot".into(), slot.to_string().into()]),
            );
            words.push("--".into());
            words.extend(command);
            root::become_manual(words)
        }
        Command::Generate { what } => or_say(generate::generate(what)),
    }
}

fn or_say<E: Into<anyhow::Error>>(result: Result<(), E>) -> u8 {
    match result {
        Ok(()) => DONE,
        Err(error) => {
            let error = error.into();
            say_error(&format!("user-factory: {error:#}"));
            match error.is::<serve::NotConfigured>() {
                true => NOT_CONFIGURED,
                false => FAILED,
            }
        }
    }
}
