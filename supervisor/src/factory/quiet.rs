//! When the helper need not be asked for its workers.
//!
//! It has one client, and makes nothing of its own accord. So where neither the store nor the server nor the
//! helper's last list has a worker, and nothing is under way that could make one, the next list is empty too, and an
//! idle host is not woken once a second to say so. It is asked again before anything is made of a job, when
//! the server shows a worker, when somebody looks, and now and then: what a person does by hand on the host, and a
//! helper that has gone away, are then seen.

use super::{Factory, Output};

/// An idle helper is asked this often, for what nobody has thought of.
const AT_LEAST_MS: u64 = 30 * 60_000;

impl Factory {
    /// Is there no reason to ask the helper?
    pub(super) fn is_quiet(&self, now: u64) -> bool {
        let heard = self.helper.answered_at;
        self.reconciled
            && !self.helper.away
            && heard.is_some_and(|at| now.saturating_sub(at) < AT_LEAST_MS)
            && self.on_host.is_empty()
            && self.workers.is_empty()
            && self.runtimes.is_empty()
            && self.strangers.is_empty()
            && self.promises.is_empty()
            && self.unplaced.is_none()
    }

    /// Has the helper been left alone for longer than a round, so that whoever wants to know how it is should say
    /// [`Input::Look`] and wait while [`Factory::is_looking`]?
    ///
    /// [`Input::Look`]: super::Input::Look
    pub fn wants_a_look(&self, now: u64) -> bool {
        let poll = self.config.factory.poll_seconds * 1000;
        let heard = self.helper.answered_at;
        !self.stopped && self.is_quiet(now) && heard.is_none_or(|at| now.saturating_sub(at) >= poll)
    }

    /// The helper is to be asked, whatever the round.
    pub(super) fn ask_the_host(&mut self) {
        if self.round.ask_the_host(self.turn) {
            self.out.push(Output::ListHost);
        }
    }

    /// Has the helper been asked, and not answered yet?
    pub fn is_looking(&self) -> bool {
        self.round.waits_for_the_host()
    }
}
