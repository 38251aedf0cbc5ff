//! The ids of the targets that the configuration has by name. The server is asked for them after a start and a reload,
//! and then only while it has not answered, or lacks one of the names: a name does not change its target under way.

use std::collections::BTreeMap;

use protocol::config::Config;
use protocol::{SlotName, Target, TargetId, TargetName};

use super::{Factory, Level, LogLine, Output};
use crate::backoff::{Backoff, Rng};
use crate::buildomat::ServerTarget;
use crate::call_error::{CallError, Peer};
use crate::schedule::SlotSchedule;

/// As many names of the server stand in a sentence.
const MAX_NAMES: usize = 10;

/// What the server has said of its targets: none where it has no call for that.
pub type TargetList = Result<Option<Vec<ServerTarget>>, CallError>;

/// What the names of the configuration stand for.
#[derive(Debug)]
pub struct Targets {
    ids: BTreeMap<TargetName, TargetId>,
    /// When the server is to be asked.
    ask_at: Option<u64>,
    is_asking: bool,
    /// The next answer is for all names, also those that have an id.
    replaces_all: bool,
    backoff: Backoff,
    answer: TargetList,
    has_answer: bool,
}

/// A name that stands for nothing yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnresolvedTarget {
    /// The first slot that has it.
    pub slot: SlotName,
    /// Which key, what is wrong, and what to do.
    pub sentence: String,
}

impl Targets {
    /// None is looked up yet.
    pub fn new(config: &Config, now: u64) -> Targets {
        let mut targets = Targets {
            ids: BTreeMap::new(),
            ask_at: None,
            is_asking: false,
            replaces_all: false,
            backoff: Backoff::default(),
            answer: Ok(None),
            has_answer: false,
        };
        targets.look_up(config, now);
        targets
    }

    /// Look all names of this configuration up. Until the answer, those that had an id keep it.
    pub fn look_up(&mut self, config: &Config, now: u64) {
        self.ids
            .retain(|name, _| names(config).any(|(_, other)| other == name));
        let any = names(config).next().is_some();
        (self.ask_at, self.replaces_all) = (any.then_some(now), any);
        (self.backoff, self.has_answer) = (Backoff::default(), false);
    }

    /// What the names stand for.
    pub fn ids(&self) -> &BTreeMap<TargetName, TargetId> {
        &self.ids
    }

    /// When the server is asked next. None while nothing is to be asked, or an answer must come first.
    pub fn next(&self) -> Option<u64> {
        self.ask_at.filter(|_| !self.is_asking)
    }

    /// Has the server been asked, and not answered yet?
    pub fn is_asking(&self) -> bool {
        self.is_asking
    }

    /// What is to be asked again is asked now.
    pub fn retry_at_once(&mut self, now: u64) {
        self.ask_at = self.ask_at.map(|at| at.min(now));
    }

    /// Is the server to be asked now? It is then being asked, and [`Targets::handle_answer`] comes next.
    pub fn begin(&mut self, now: u64) -> bool {
        let due = self.next().is_some_and(|at| at <= now);
        if due {
            (self.ask_at, self.is_asking) = (None, true);
        }
        due
    }

    /// What the server has answered. A reload since it was asked has it asked again.
    pub fn handle_answer(&mut self, config: &Config, now: u64, rng: &mut Rng, answer: TargetList) {
        self.is_asking = false;
        if let Ok(Some(list)) = &answer {
            let replaces_all = std::mem::take(&mut self.replaces_all);
            for (_, name) in names(config) {
                let found = list.iter().find(|target| target.name == name.as_str());
                match found {
                    Some(found) if replaces_all => drop(self.ids.insert(name.clone(), found.id)),
                    Some(found) => drop(self.ids.entry(name.clone()).or_insert(found.id)),
                    None if replaces_all => drop(self.ids.remove(name)),
                    None => {}
                }
            }
        }
        // Asked before the configuration was loaded again.
        if self.ask_at.is_some() {
            self.replaces_all = true;
            return;
        }
        let is_whole =
            matches!(&answer, Ok(Some(_))) && names(config).all(|(_, name)| self.ids.contains_key(name));
        self.ask_at = match (&answer, is_whole) {
            (_, true) => None,
            (Err(error), _) => Some(now + self.backoff.fail_with(error, rng)),
            (Ok(_), _) => Some(now + self.backoff.fail(Peer::Server, rng)),
        };
        (self.answer, self.has_answer) = (answer, true);
    }

    /// The names without an id, each once, in the order of their first slots.
    pub fn unresolved(&self, config: &Config) -> Vec<UnresolvedTarget> {
        let mut seen = BTreeMap::new();
        for (slot, name) in names(config).filter(|(_, name)| !self.ids.contains_key(*name)) {
            seen.entry(name).or_insert_with(|| UnresolvedTarget {
                slot: slot.clone(),
                sentence: self.why(slot, name),
            });
        }
        seen.into_values().collect()
    }

    /// Why this slot's target has no id.
    pub fn why(&self, slot: &SlotName, name: &TargetName) -> String {
        let key = format!("slots.{slot}.target = {name:?}");
        match &self.answer {
            _ if !self.has_answer => format!("{key} is being looked up on the server"),
            Err(error) => format!("{key} is not looked up on the server yet: {}", error.sentence),
            Ok(None) => format!(
                "{key} is a name, and the server has no GET /0/factory/targets to look it up: write the target's id there"
            ),
            Ok(Some(list)) => {
                let known = match known(list) {
                    known if known.is_empty() => "no targets".to_owned(),
                    known => known,
                };
                format!(
                    "{key} is no target of the server, which has {known}: correct the name, or write the target's id"
                )
            }
        }
    }
}

/// The server's names, for a sentence.
fn known(list: &[ServerTarget]) -> String {
    let shown = list.iter().take(MAX_NAMES);
    let shown = shown.map(|target| format!("{:?}", target.name.chars().take(64).collect::<String>()));
    let more = list.len().saturating_sub(MAX_NAMES);
    let more = (more > 0).then(|| format!("{more} more"));
    shown.chain(more).collect::<Vec<_>>().join(", ")
}

/// The slots whose target is a name.
fn names(config: &Config) -> impl Iterator<Item = (&SlotName, &TargetName)> {
    config.slots.iter().filter_map(|(slot, of)| match &of.target {
        Target::Name(name) => Some((slot, name)),
        Target::Id(_) => None,
    })
}

impl Factory {
    /// What the names of the configuration stand for.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// Why this slot takes no job: its target is a name without an id.
    pub fn unresolved_target(&self, slot: &SlotName) -> Option<String> {
        match &self.config.slots.get(slot)?.target {
            Target::Name(name) if !self.targets.ids.contains_key(name) => Some(self.targets.why(slot, name)),
            _ => None,
        }
    }

    pub(super) fn ask_for_targets(&mut self, now: u64) {
        if self.targets.begin(now) {
            self.out.push(Output::ListTargets);
        }
    }

    pub(super) fn handle_target_list(&mut self, now: u64, answer: TargetList) {
        let (had, missed) = (self.targets.ids.clone(), self.targets.unresolved(&self.config));
        self.targets
            .handle_answer(&self.config, now, &mut self.rng, answer);
        if self.targets.ids != had {
            self.schedule = SlotSchedule::of(&self.config, &self.targets.ids);
        }
        for (name, id) in self
            .targets
            .ids
            .iter()
            .filter(|(name, id)| had.get(*name) != Some(*id))
        {
            self.out
                .push(log_line(Level::Info, None, format!("target {name:?} is {id}")));
        }
        for UnresolvedTarget { slot, sentence } in self.targets.unresolved(&self.config) {
            if !missed.iter().any(|known| known.sentence == sentence) {
                let text = format!("no jobs are taken in this slot: {sentence}");
                self.out.push(log_line(Level::Warn, Some(slot), text));
            }
        }
    }
}

fn log_line(level: Level, slot: Option<SlotName>, text: String) -> Output {
    Output::Log(LogLine {
        level,
        worker: None,
        slot,
        job: None,
        text,
    })
}
