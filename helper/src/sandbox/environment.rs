//! The variables of the agent, of a job's tasks, and of a command of the manual program.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use protocol::config::{
    BaseUrl, Config, Destination, Egress, EnvName, EnvValue, HTTP_PROXY, Host, Slot, UsbName,
};
use protocol::{Uid, UserName};

use crate::sandbox::network;

/// The variables by which programs find the HTTP proxy of their job. Programs read them in lower case, in upper case or in
/// both.
fn proxy_variables(server: &BaseUrl, egress: &Egress) -> BTreeMap<String, String> {
    let proxy = format!("http://{HTTP_PROXY}");
    let mut own = "localhost,127.0.0.1,127.0.0.0/8,::1".to_owned();
    // Programs take each name below one of these for it: the job's own must not be above one that the proxy leads to.
    let host = nix::unistd::gethostname().unwrap_or_default();
    let host = network::as_name(&host).unwrap_or_default().to_ascii_lowercase();
    let is_below = |to: &Destination| match &to.host {
        Host::Name(name) | Host::Below(name) => format!(".{name}").ends_with(&format!(".{host}")),
        Host::Address(_) => false,
    };
    if !host.is_empty() && !egress.audit && !egress.allow.iter().any(is_below) {
        own += &format!(",{host}");
    }
    // The buildomat server is reached without it, as by the agent.
    if let Some((name, _)) = server.name_and_port() {
        own += &format!(",{name}");
    }
    let variables = [
        ("http_proxy", &proxy),
        ("https_proxy", &proxy),
        ("no_proxy", &own),
    ];
    let both = |(name, value): (&str, &String)| {
        [name.to_owned(), name.to_ascii_uppercase()].map(|name| (name, value.clone()))
    };
    variables.into_iter().flat_map(both).collect()
}

/// A program with the environment of a worker's first one, and nothing of ours.
pub fn command(program: &Path, user: &UserName) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", format!("/home/{user}"))
        .env("USER", user.to_string())
        .env("LOGNAME", user.to_string())
        .env("LANG", "C.UTF-8")
        .env("TZ", "UTC");
    command
}

/// The environment that buildomat's agent gives a task, for a command of the manual program. A task has no other variables but
/// the slot's, and two that name the job.
pub fn task_environment(server: &BaseUrl, user: &UserName, uid: Uid, slot: &Slot) -> Vec<(String, String)> {
    let path = "/var/run/buildomat/agent/bin:/usr/bin:/bin:/usr/sbin:/sbin:/opt/ooce/bin:/opt/ooce/sbin";
    let mut variables = vec![
        ("HOME".to_owned(), format!("/home/{user}")),
        ("USER".to_owned(), user.to_string()),
        ("LOGNAME".to_owned(), user.to_string()),
        ("TZ".to_owned(), "UTC".to_owned()),
        ("PATH".to_owned(), path.to_owned()),
        ("LANG".to_owned(), "en_US.UTF-8".to_owned()),
    ];
    variables.extend(slot_variables(server, uid, slot));
    variables
}

/// The variables that the agent adds to each task's: where its `/run` has a directory for it alone, the HTTP proxy where
/// the slot has one, its USB devices, and the slot's own.
pub fn slot_variables(server: &BaseUrl, uid: Uid, slot: &Slot) -> BTreeMap<String, String> {
    let runtime = ("XDG_RUNTIME_DIR".to_owned(), format!("/run/user/{uid}"));
    let egress = slot.egress.as_ref().filter(|egress| egress.has_http_proxy());
    let proxy = egress.map_or_else(BTreeMap::new, |egress| proxy_variables(server, egress));
    let text = |(name, value): (&EnvName, &EnvValue)| (name.as_str().to_owned(), value.as_str().to_owned());
    std::iter::once(runtime)
        .chain(proxy)
        .chain(slot.usb.keys().flat_map(usb_variables))
        .chain(slot.env.iter().map(text))
        .collect()
}

/// Those of a USB device, as this process's `/dev` has it. The device itself, which may be slow, is not asked.
fn usb_variables(name: &UsbName) -> Vec<(String, String)> {
    let place = Path::new("/dev/slot").join(name.as_str());
    let link = |name: &str| std::fs::read_link(place.join(name)).ok();
    let port = link("sysfs").and_then(|sysfs| sysfs.file_name()?.to_str()?.parse().ok());
    let serial = link("serial").and_then(|serial| serial.to_str().map(str::to_owned));
    let nodes = std::fs::read_dir(&place).into_iter().flatten().flatten();
    let nodes: Vec<String> = nodes
        .filter_map(|node| node.file_name().into_string().ok())
        .collect();
    protocol::usb::variables(name, port.as_ref(), serial.as_deref(), &nodes)
}

/// The variables of the agent of this slot: those of the configuration, and its proxy, unless the former name one. An agent
/// that reaches the server by the egress proxy alone gets no variable of a proxy: the egress proxy asks it.
pub fn agent_variables(config: &Config, slot: &Slot) -> Vec<(String, String)> {
    let own = config.factory.agent_env.iter();
    let mut variables: Vec<(String, String)> = own.map(|(k, v)| (k.to_string(), v.to_string())).collect();
    for name in ["http_proxy", "https_proxy"] {
        let is_named = variables.iter().any(|(own, _)| own.eq_ignore_ascii_case(name));
        if let Some(proxy) = config.general.proxy.as_ref().filter(|_| !is_named) {
            variables.push((name.to_owned(), proxy.to_string()));
        }
    }
    if slot.egress.is_some() {
        variables.retain(|(name, _)| !name.to_ascii_lowercase().ends_with("_proxy"));
    }
    variables
}

#[cfg(test)]
mod tests {
    use protocol::WorkerId;
    use protocol::config::HELPER_VARIABLES;

    use super::*;

    #[test]
    fn an_agent_gets_its_variables_and_the_proxy_where_it_can_reach_one() {
        let target = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
        let variables = |slot: &str, general: &str, factory: &str| {
            let config = Config::parse(&format!(
                "[general]\nbaseurl = \"http://b\"\n{general}[factory]\ntoken_file = \"/t\"\n{factory}\
                 [slots.a]\n{target}[slots.b]\n{target}network = \"none\"\n"
            ))
            .unwrap();
            let found = agent_variables(&config, &config.slots[&slot.parse().unwrap()]);
            let found: Vec<String> = found
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            found.join(" ")
        };
        let (proxy, own) = ("proxy = \"http://p:1\"\n", "agent_env.SSL_CERT_FILE = \"/ca\"\n");
        assert_eq!(variables("a", "", ""), "");
        assert_eq!(
            variables("a", proxy, own),
            "SSL_CERT_FILE=/ca http_proxy=http://p:1 https_proxy=http://p:1"
        );
        let named = "agent_env.HTTPS_PROXY = \"http://q:2\"\nagent_env.no_proxy = \"x\"\n";
        assert_eq!(
            variables("a", proxy, named),
            "HTTPS_PROXY=http://q:2 no_proxy=x http_proxy=http://p:1"
        );
        for factory in [own.to_owned(), format!("{named}{own}")] {
            assert_eq!(variables("b", proxy, &factory), "SSL_CERT_FILE=/ca");
        }
    }

    #[test]
    fn a_job_is_told_of_its_http_proxy_where_it_has_one_unless_the_slot_says_otherwise() {
        let variables = |slot: &str| {
            let config = Config::parse(&format!(
                "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
                 target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{slot}\n"
            ))
            .unwrap();
            let slot = config.slots.values().next().unwrap();
            let variables = slot_variables(&config.general.baseurl, Uid::try_from(2_000_000).unwrap(), slot);
            let named = |(name, value): (String, String)| {
                let is_proxys = name.to_ascii_lowercase().ends_with("_proxy");
                is_proxys.then(|| format!("{name}={value}"))
            };
            variables
                .into_iter()
                .filter_map(named)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let host = nix::unistd::gethostname().unwrap();
        let host = host.to_str().unwrap().to_ascii_lowercase();
        let proxy = "http://127.64.0.1:3128";
        for without in ["", "network = \"none\"", "network = { allow = [] }"] {
            assert_eq!(variables(without), "");
        }
        for (with, name) in [
            (
                "network = { allow = [\"x.org:80\"] }".to_owned(),
                format!("{host},"),
            ),
            // By its suffix, go.dev would be reached without the proxy on a host that is called dev.
            (
                format!("network = {{ allow = [\"x.{host}:80\"] }}"),
                String::new(),
            ),
            (
                format!("network = {{ allow = [\"*.{host}:80\"] }}"),
                String::new(),
            ),
            ("network.audit = true".to_owned(), String::new()),
        ] {
            let own = format!("localhost,127.0.0.1,127.0.0.0/8,::1,{name}b");
            assert_eq!(
                variables(&with),
                format!(
                    "HTTPS_PROXY={proxy} HTTP_PROXY={proxy} NO_PROXY={own} http_proxy={proxy} https_proxy={proxy} no_proxy={own}"
                )
            );
        }
        let named = variables("network.audit = true\nenv.no_proxy = \"mine\"");
        assert!(named.ends_with(" no_proxy=mine"), "{named}");
    }

    #[test]
    fn the_variables_that_a_configuration_may_not_set_are_those_of_the_helper() {
        let command = command(Path::new("/x"), &UserName::from(WorkerId::from_bits(1)));
        let mut set: Vec<_> = command
            .get_envs()
            .map(|(name, _)| name.to_str().unwrap())
            .collect();
        let mut refused = HELPER_VARIABLES;
        set.sort_unstable();
        refused.sort_unstable();
        assert_eq!(set, refused);
    }
}
