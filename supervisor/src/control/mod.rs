//! The control API: HTTP on a Unix socket, for the operator's command.
//!
//! | call | answer |
//! | --- | --- |
//! | `GET /v1/status` | [`api::Status`] |
//! | `GET /v1/workers/{id}` | [`api::Details`] |
//! | `GET /v1/workers/{id}/console?follow=true` | the console's bytes; with `follow`, as they come |
//! | `POST /v1/drain`, `POST /v1/resume` | 204: take no new jobs; take them again |
//! | `POST /v1/slots/{slot}/drain`, `…/resume` | the same of one slot |
//! | `POST /v1/workers/{id}/kill` | 204: its processes are ended, and its files stay |
//! | `POST /v1/workers/{id}/destroy` | 204: the worker will be deleted, whatever it does, held or not |
//! | `POST /v1/reload` | 204, or 422 with every mistake of the configuration, and nothing has changed |
//! | `GET /metrics` | Prometheus' text |
//! | `GET /` | a page that shows the status |
//!
//! What is not done is answered with 4xx or 5xx and an [`api::ErrorBody`]. The first part of a path is the version:
//! fields may be added to it, and nothing in it changes its meaning. On an address (`factory.status_address`)
//! there is the same without the calls that change something, and without consoles.
//!
//! Nothing here decides anything: what is shown is computed of the core's state, and what is asked is passed to it.

pub mod api;
pub mod client;
pub mod listener;
pub mod metrics;
pub mod processes;
pub mod server;
pub mod state;
pub mod status;
