//! `user-factory check`: all that can be known before anything is started.

use std::path::Path;

use futures_util::future::join_all;
use protocol::config::{Config, Mistake, ProxyUrl};
use supervisor::agent_cache::{self, Agent, AgentCache};
use supervisor::backoff::Rng;
use supervisor::buildomat::BuildomatClient;
use supervisor::config_check;
use supervisor::control::client::Client;
use supervisor::egress_proxy::try_destination;
use supervisor::factory::targets::Targets;
use supervisor::helper_client::HelperClient;
use supervisor::preflight::{self, HostFacts};
use supervisor::settings::{self, Places};
use supervisor::token::{TokenPlaces, TokenStore};
use supervisor::usb::{self, UsbMonitor};

use super::{DONE, FAILED, manual, print_line};

/// Print every mistake, or a summary of the slots and of the host; with `online`, ask the server and the helper.
pub fn check(path: &Path, online: bool, root: &Path) -> u8 {
    let loaded = config_check::load(path, root).and_then(|config| match token_of(&config, path, root) {
        Ok(tokens) => Ok((config, tokens)),
        Err(error) => {
            let text = settings::read(path)?;
            Err(vec![Mistake {
                line: config_check::line_of(&text, &["factory", "token_file"]),
                message: format!("{error:#}"),
            }])
        }
    });
    match loaded {
        Ok((config, tokens)) => report(&config, &tokens, path, online, root),
        Err(mistakes) => {
            print_line(&settings::print(path, &mistakes));
            FAILED
        }
    }
}

/// The token that `serve` uses: where this is the configuration of the running unit, what systemd has passed to that.
fn token_of(config: &Config, path: &Path, root: &Path) -> anyhow::Result<TokenStore> {
    TokenStore::open(match path == Places::below(root).config {
        true => TokenPlaces::of_the_unit(config, root),
        false => TokenPlaces::of_this_process(config),
    })
}

fn report(config: &Config, tokens: &TokenStore, path: &Path, online: bool, root: &Path) -> u8 {
    let findings = preflight::findings(&HostFacts::read(), config, root);
    print_line(&settings::summary(config));
    print_line(&format!("token of {}\n", tokens.source()));
    print_line(&preflight::print(&findings));
    print_line(&usb_warnings(config, path));
    let (answer, refused) = manual::check(path, root);
    print_line(&format!("helper: {answer}\n"));
    let fine = !refused && !findings.iter().any(|finding| finding.needed);
    let answered = !online || ask(config, tokens, root);
    if fine && answered { DONE } else { FAILED }
}

/// `FILE:LINE: warning: sentence`, one a line.
fn usb_warnings(config: &Config, path: &Path) -> String {
    if config.slots.values().all(|slot| slot.usb.is_empty()) {
        return String::new();
    }
    let text = settings::read(path).unwrap_or_default();
    let mut monitor = UsbMonitor::new(usb::devices_directory());
    let devices: Vec<_> = monitor.wait().into_iter().map(|(device, _)| device).collect();
    let warnings = usb::check::warnings(&text, config, &devices, &monitor.unread());
    settings::print(path, &warnings)
}

/// Do the server, its agent and the helper answer? A line for each.
fn ask(config: &Config, tokens: &TokenStore, root: &Path) -> bool {
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            print_line(&format!("online: cannot start the runtime: {error}\n"));
            return false;
        }
    };
    let answers = runtime.block_on(answers(config, tokens, root));
    for (what, answer) in &answers {
        match answer {
            Ok(how) => print_line(&format!("online {what}: {how}\n")),
            Err(why) => print_line(&format!("online {what}: FAILED: {why}\n")),
        }
    }
    answers.iter().all(|(_, answer)| answer.is_ok())
}

async fn answers(config: &Config, tokens: &TokenStore, root: &Path) -> Vec<(String, Result<String, String>)> {
    let mut answers = Vec::new();
    let buildomat = BuildomatClient::new(&config.general, tokens.clone()).map_err(|e| e.to_string());
    match buildomat {
        Err(why) => answers.push(("server".to_owned(), Err(why))),
        Ok(buildomat) => {
            let ping = buildomat.ping().await.map_err(|e| e.to_string());
            answers.push((
                "server".to_owned(),
                ping.map(|_| format!("{} answers and takes the token", config.general.baseurl)),
            ));
            let agent = match &config.factory.agent {
                Some(path) => of_the_host(path.as_path()).await,
                None => download(&buildomat).await,
            };
            answers.push(("agent".to_owned(), agent));
            answers.extend(targets(config, &buildomat).await);
        }
    }
    answers.push(("helper".to_owned(), helper(&Places::below(root)).await));
    answers.extend(destinations(config).await);
    answers
}

/// What each slot's `network.allow` names, all of a slot at the same time.
async fn destinations(config: &Config) -> Vec<(String, Result<String, String>)> {
    let proxy = config.general.proxy.as_ref().map(ProxyUrl::host_and_port);
    let mut answers = Vec::new();
    for (slot, egress) in config
        .slots
        .iter()
        .filter_map(|(name, slot)| Some((name, slot.egress.as_ref()?)))
    {
        let tries = egress.allow.iter().map(|to| try_destination(egress, to, proxy));
        let sentences = join_all(tries).await.into_iter().filter_map(Result::err);
        let sentences: Vec<String> = sentences.collect();
        if !egress.allow.is_empty() {
            let answer = match sentences.is_empty() {
                true => Ok("each of network.allow answers; of *.DOMAIN none is tried".to_owned()),
                false => Err(sentences.join("; ")),
            };
            answers.push((format!("slot {slot}"), answer));
        }
    }
    answers
}

/// The targets that the configuration names, if it names any.
async fn targets(config: &Config, buildomat: &BuildomatClient) -> Option<(String, Result<String, String>)> {
    let mut targets = Targets::new(config, 0);
    if !targets.begin(0) {
        return None;
    }
    let answer = buildomat.list_targets().await.map_err(|error| error.call_error());
    targets.handle_answer(config, 0, &mut Rng::new(0), answer);
    let unresolved = targets.unresolved(config);
    let sentences: Vec<String> = unresolved.into_iter().map(|name| name.sentence).collect();
    let ids = targets.ids().iter().map(|(name, id)| format!("{name:?} is {id}"));
    Some((
        "targets".to_owned(),
        match sentences.is_empty() {
            true => Ok(ids.collect::<Vec<_>>().join(", ")),
            false => Err(sentences.join("; ")),
        },
    ))
}

/// It serves the supervisor's user alone: root asks a supervisor that runs.
async fn helper(places: &Places) -> Result<String, String> {
    if !nix::unistd::geteuid().is_root() {
        let listed = HelperClient::new(places.helper.clone()).list().await;
        return listed
            .map(|workers| format!("it serves, with {} workers", workers.len()))
            .map_err(|e| e.to_string());
    }
    let status = match Client::new(&places.control_socket()) {
        Ok(supervisor) => supervisor.status().await,
        Err(error) => Err(error),
    };
    let helper = status.map_err(|error| error.to_string())?.helper;
    match helper.reachable {
        Some(true) => Ok("it serves the supervisor that runs".into()),
        Some(false) => Err(helper.trouble.unwrap_or_default()),
        None => Err("the supervisor has not asked it yet: repeat this".into()),
    }
}

/// The agent that `factory.agent` names.
async fn of_the_host(path: &Path) -> Result<String, String> {
    let agent = Agent::of_the_host(path.to_owned()).await?;
    Ok(format!("{}, {} bytes", path.display(), agent.size()?))
}

/// The whole of the agent, as a worker would get it.
async fn download(buildomat: &BuildomatClient) -> Result<String, String> {
    let dir = tempfile::tempdir().map_err(|e| format!("cannot make a temporary directory: {e}"))?;
    let agent = AgentCache::new(dir.path().to_owned(), agent_cache::hints())
        .get(buildomat)
        .await?;
    Ok(format!("downloaded and unpacked, {} bytes", agent.size()?))
}
