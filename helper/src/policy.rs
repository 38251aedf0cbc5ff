//! The decisions, pure: may this worker have this slot, and which uid does it get?

use std::collections::BTreeSet;

use protocol::config::{Config, Network, Slot, UidRange};
use protocol::{Error, ErrorKind, SlotName, Uid, WorkerId};

/// One worker that has a record on this host, for the decisions here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    pub worker: WorkerId,
    pub slot: SlotName,
    pub uid: Uid,
}

/// May `worker`, which has no record yet, take `slot`?
pub fn may_take(config: &Config, tenants: &[Tenant], worker: WorkerId, slot: &SlotName) -> Result<(), Error> {
    if !config.slots.contains_key(slot) {
        return Err(no_such_slot(slot));
    }
    for other in tenants.iter().filter(|other| other.worker != worker) {
        if other.slot == *slot {
            let message = format!("slot {slot} has worker {}: delete that one first", other.worker);
            return Err(Error::new(ErrorKind::SlotTaken, message));
        }
        if config.conflict(&other.slot, slot) {
            let message = format!(
                "slot {slot} conflicts with {}, which has worker {}: delete that one first",
                other.slot, other.worker
            );
            return Err(Error::new(ErrorKind::SlotTaken, message));
        }
    }
    // Only workers whose slots have left the configuration can bring the count here.
    if tenants.len() >= config.slots.len() {
        let message = format!(
            "{} workers are alive, as many as there are slots: delete those of removed slots first",
            tenants.len()
        );
        return Err(Error::new(ErrorKind::SlotTaken, message));
    }
    Ok(())
}

pub fn no_such_slot(slot: &SlotName) -> Error {
    Error::new(
        ErrorKind::NoSuchSlot,
        format!("slot {slot} is not in the configuration: add it or use another"),
    )
}

/// The variables of the agent of this slot: those of the configuration, and its proxy, unless the former name one. An agent
/// that reaches the server by the relay alone gets no variable of a proxy: the relay asks the proxy.
pub fn agent_variables(config: &Config, slot: &Slot) -> Vec<(String, String)> {
    let own = config.factory.agent_env.iter();
    let mut variables: Vec<(String, String)> = own.map(|(k, v)| (k.to_string(), v.to_string())).collect();
    for name in ["http_proxy", "https_proxy"] {
        let is_named = variables.iter().any(|(own, _)| own.eq_ignore_ascii_case(name));
        if let Some(proxy) = config.general.proxy.as_ref().filter(|_| !is_named) {
            variables.push((name.to_owned(), proxy.to_string()));
        }
    }
    if slot.network == Network::None {
        variables.retain(|(name, _)| !name.to_ascii_lowercase().ends_with("_proxy"));
    }
    variables
}

/// The uids of the range in the order in which to try them: all of them, from a random beginning, but
/// those in use.
pub fn candidates(range: UidRange, random: u64, used: &BTreeSet<u32>) -> impl Iterator<Item = Uid> {
    let (first, len) = (range.first.get(), range.len());
    let start = (random % u64::from(len)) as u32;
    (0..len)
        .map(move |i| first + (start + i) % len)
        .filter(|uid| !used.contains(uid))
        .filter_map(|uid| Uid::try_from(uid).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let slot = |name: &str, rest: &str| {
            format!("[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{rest}\n")
        };
        let head = "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n";
        Config::parse(
            &(head.to_owned()
                + &slot("a", "conflicts_with_slots = [\"b\"]")
                + &slot("b", "")
                + &slot("c", "")),
        )
        .unwrap()
    }

    fn tenant(worker: u128, slot: &str) -> Tenant {
        let uid = Uid::try_from(2_000_000 + worker as u32).unwrap();
        Tenant {
            worker: WorkerId::from_bits(worker),
            slot: slot.parse().unwrap(),
            uid,
        }
    }

    #[test]
    fn a_slot_is_for_one_worker_and_conflicts_work_both_ways() {
        let config = config();
        let take = |tenants: &[Tenant], worker: u128, slot: &str| {
            may_take(
                &config,
                tenants,
                WorkerId::from_bits(worker),
                &slot.parse().unwrap(),
            )
            .map_err(|e| e.kind)
        };
        assert_eq!(take(&[], 1, "a"), Ok(()));
        assert_eq!(take(&[], 1, "zz"), Err(ErrorKind::NoSuchSlot));
        assert_eq!(take(&[tenant(2, "a")], 1, "a"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[tenant(2, "b")], 1, "a"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[tenant(2, "a")], 1, "b"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[tenant(2, "a")], 1, "c"), Ok(()));
        let gone = [tenant(2, "x"), tenant(3, "y"), tenant(4, "z")];
        assert_eq!(take(&gone, 1, "c"), Err(ErrorKind::SlotTaken));
    }

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
    fn every_free_uid_is_tried_once_and_no_used_one() {
        let first = Uid::try_from(2_000_000).unwrap();
        let range = UidRange {
            first,
            last: Uid::try_from(2_000_009).unwrap(),
        };
        for random in [0, 3, 9, u64::MAX] {
            let used = BTreeSet::from([2_000_003, 2_000_009]);
            let tried: BTreeSet<u32> = candidates(range, random, &used).map(Uid::get).collect();
            assert_eq!(tried.len(), 8);
            assert!(tried.is_disjoint(&used));
        }
    }
}
