//! The server's rules for jobs: submitted, assigned, fed with events and files, completed or cancelled.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use axum::body::Bytes;
use jiff::Timestamp;

use super::json::{AddFile, AddFileResult, JobEvent, JobOutput, JobSubmit, OutputRule, StoreValue};
use super::state::State;
use super::types::{Input, Job, JobSpec, MAX_RUNTIME, Progress, ServerError, StoreEntry, Task};
use super::ulid::Ulid;

/// The most bytes of a file in one request: what the real agent sends (buildomat, `agent/src/upload.rs`).
pub const MAX_CHUNK: usize = 5 * 1024 * 1024;
/// The most bytes of one file: the default of `job.max_size_per_file_mb` (buildomat, `server/src/config.rs`).
pub const MAX_FILE: u64 = 1024 * 1024 * 1024;

/// What a commit of chunks becomes.
#[derive(Clone, Copy, Debug)]
pub enum FileKind {
    Input,
    Output,
}

impl State {
    pub(crate) fn submit(&mut self, body: JobSubmit, max_runtime: Duration) -> Result<Ulid, ServerError> {
        let invalid = |what: String| Err(ServerError::Invalid(what));
        if !body.depends.is_empty() {
            return invalid("this fake server knows no dependencies between jobs".to_string());
        }
        if body.tasks.is_empty() {
            return invalid("must specify at least one task".to_string());
        }
        if let Some(bad) = body.inputs.iter().find(|i| i.is_empty() || i.contains('/')) {
            return invalid(format!("input name {bad:?} must be a plain file name"));
        }
        let Some(target) = self.find_target(&body.target) else {
            return invalid(format!("could not resolve target {:?}", body.target));
        };
        let rules = body
            .output_rules
            .iter()
            .map(|text| {
                Ok((
                    text.clone(),
                    OutputRule::parse(text).map_err(ServerError::Invalid)?,
                ))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let id = self.new_id();
        let job = Job {
            id,
            name: body.name,
            target,
            tasks: body
                .tasks
                .into_iter()
                .map(|spec| Task {
                    spec,
                    progress: Progress::Pending,
                })
                .collect(),
            inputs: body
                .inputs
                .into_iter()
                .map(|name| Input { name, file: None })
                .collect(),
            output_rules: rules,
            tags: body.tags,
            max_runtime,
            worker: None,
            progress: Progress::Pending,
            cancelled: false,
            submitted: self.now,
            assigned: None,
            completed: None,
            events: Vec::new(),
            outputs: Vec::new(),
            store: BTreeMap::new(),
            chunks: HashMap::new(),
            files: HashMap::new(),
            commits: HashMap::new(),
        };
        self.jobs.insert(id, job);
        Ok(id)
    }

    /// Submit it, its inputs uploaded.
    pub fn submit_spec(&mut self, spec: JobSpec) -> Result<Ulid, ServerError> {
        let body = JobSubmit {
            name: spec.name,
            target: spec.target,
            output_rules: spec.output_rules,
            tasks: spec.tasks,
            inputs: spec.inputs.iter().map(|(name, _)| name.clone()).collect(),
            tags: BTreeMap::new(),
            depends: BTreeMap::new(),
        };
        let id = self.submit(body, spec.max_runtime)?;
        for (name, bytes) in spec.inputs {
            let file = self.new_id();
            self.job_mut(id)?.add_input(&name, file, bytes)?;
        }
        Ok(id)
    }

    pub(crate) fn submit_http(&mut self, body: JobSubmit) -> Result<Ulid, ServerError> {
        self.submit(body, MAX_RUNTIME)
    }

    pub(crate) fn job(&self, job: Ulid) -> Result<&Job, ServerError> {
        self.jobs.get(&job).ok_or(ServerError::Internal)
    }

    pub(crate) fn job_mut(&mut self, job: Ulid) -> Result<&mut Job, ServerError> {
        self.jobs.get_mut(&job).ok_or(ServerError::Internal)
    }

    /// The job as its worker's agent may touch it.
    pub fn workers_job(&mut self, worker: Ulid, job: Ulid) -> Result<&mut Job, ServerError> {
        let j = self.job_mut(job)?;
        if j.worker == Some(worker) {
            Ok(j)
        } else {
            Err(ServerError::Forbidden("not your job"))
        }
    }

    /// Ties a queued job to a worker for good; whatever lease there was is spent.
    pub fn assign(&mut self, job: Ulid, worker: Ulid) {
        self.leases.remove(&job);
        let now = self.now;
        let (Some(j), Some(w)) = (self.jobs.get_mut(&job), self.workers.get_mut(&worker)) else {
            return;
        };
        j.worker = Some(worker);
        j.assigned = Some(now);
        w.job = Some(job);
        let by = self.factories.get(&w.factory).map_or("", |f| f.name.as_str());
        let text = format!(
            "job assigned to worker {worker} [{by}, {}]",
            w.private.as_deref().unwrap_or("-")
        );
        self.control(job, &text);
    }

    pub(crate) fn control(&mut self, job: Ulid, text: &str) {
        self.append(job, None, "control", None, text);
    }

    pub(crate) fn append(
        &mut self,
        job: Ulid,
        task: Option<u32>,
        stream: &str,
        time_remote: Option<Timestamp>,
        payload: &str,
    ) {
        let time = self.now;
        if let Some(j) = self.jobs.get_mut(&job) {
            let (seq, stream, payload) = (j.events.len(), stream.to_string(), payload.to_string());
            j.events.push(JobEvent {
                seq,
                task,
                stream,
                time,
                time_remote,
                payload,
            });
        }
    }

    /// The end of a job; the first word counts.
    pub fn finish(&mut self, job: Ulid, failed: bool) {
        self.leases.remove(&job);
        let now = self.now;
        let Some(j) = self.jobs.get_mut(&job).filter(|j| !j.is_complete()) else {
            return;
        };
        j.progress = Progress::ended(failed || j.tasks.iter().any(|t| t.progress == Progress::Failed));
        j.completed = Some(now);
    }

    /// Takes effect at the next tick. A conflict where the job has ended.
    pub fn cancel(&mut self, job: Ulid) -> Result<(), ServerError> {
        let j = self.job_mut(job)?;
        if j.is_complete() {
            return Err(ServerError::Conflict(
                "cannot cancel a job that is already complete".to_string(),
            ));
        }
        if !j.cancelled {
            j.cancelled = true;
            self.leases.remove(&job);
            self.control(job, "job cancelled");
        }
        Ok(())
    }

    /// The first call starts a commit and the next one, with the same id, tells how it ended: callers
    /// must poll, as with the real server.
    pub fn add_file(
        &mut self,
        job: Ulid,
        kind: FileKind,
        add: &AddFile,
    ) -> Result<AddFileResult, ServerError> {
        if add.size > MAX_FILE {
            return Err(ServerError::Invalid(format!(
                "size {} is above {MAX_FILE}",
                add.size
            )));
        }
        let chunks = add
            .chunks
            .iter()
            .map(|c| c.parse())
            .collect::<Result<Vec<Ulid>, _>>();
        let chunks = chunks.map_err(|_| ServerError::Internal)?;
        let commit = add
            .commit_id
            .parse::<Ulid>()
            .map_err(|_| ServerError::Internal)?
            .to_string();
        let file = self.new_id();
        let j = self.job_mut(job)?;
        if let Some(error) = j.commits.get(&commit) {
            return Ok(AddFileResult {
                complete: true,
                error: error.clone(),
            });
        }
        if j.is_complete() {
            return Err(ServerError::Conflict("job is already complete".to_string()));
        }
        let outcome = j.join(&chunks, add.size).and_then(|bytes| match kind {
            FileKind::Input => j.add_input(&add.path, file, bytes).map_err(|e| e.to_string()),
            FileKind::Output => {
                j.add_output(&add.path, file, bytes);
                Ok(())
            }
        });
        j.commits.insert(commit, outcome.err());
        Ok(AddFileResult {
            complete: false,
            error: None,
        })
    }
}

impl Job {
    fn join(&mut self, chunks: &[Ulid], size: u64) -> Result<Bytes, String> {
        let mut all = Vec::new();
        for id in chunks {
            all.extend_from_slice(
                self.chunks
                    .get(id)
                    .ok_or_else(|| format!("chunk {id} not found"))?,
            );
        }
        if all.len() as u64 != size {
            return Err(format!(
                "size {size} was announced, but the chunks hold {}",
                all.len()
            ));
        }
        self.chunks.retain(|id, _| !chunks.contains(id));
        Ok(all.into())
    }

    pub(crate) fn add_input(&mut self, name: &str, file: Ulid, bytes: Bytes) -> Result<(), ServerError> {
        let input = self
            .inputs
            .iter_mut()
            .find(|i| i.name == name && i.file.is_none());
        let input = input.ok_or_else(|| ServerError::Conflict(format!("job awaits no input {name:?}")))?;
        input.file = Some(file);
        self.files.insert(file, bytes);
        Ok(())
    }

    fn add_output(&mut self, path: &str, id: Ulid, bytes: Bytes) {
        self.outputs.push(JobOutput {
            id,
            path: path.to_string(),
            size: bytes.len() as u64,
        });
        self.files.insert(id, bytes);
    }

    pub(crate) fn complete_task(&mut self, task: u32, failed: bool) -> Result<(), ServerError> {
        let t = self.tasks.get_mut(task as usize).ok_or(ServerError::Internal)?;
        if self.progress != Progress::Pending || t.progress != Progress::Pending {
            return Err(ServerError::Conflict(format!("task {task} is already complete")));
        }
        t.progress = Progress::ended(failed);
        Ok(())
    }

    pub(crate) fn store_put(&mut self, name: &str, value: StoreValue, source: &'static str, time: Timestamp) {
        self.store
            .insert(name.to_string(), StoreEntry { value, source, time });
    }
}
