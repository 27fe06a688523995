//! A hub repository's snapshot in the local cache, downloaded where it is not complete.

use std::path::PathBuf;

use crate::error::{Error, Result};

/// The three ways to a model without the hub.
const WAYS_OUT: &str = "give a local checkpoint (--model DIR or FILE.gguf), fetch one \
                        (scripts/fetch-weights.sh), or take random weights (--model synthetic)";

fn fail(id: &str, why: impl std::fmt::Display) -> anyhow::Error {
    Error::Weights { file: id.into(), why: why.to_string() }.into()
}

/// The directory that holds the files of `owner/name` at its main branch.
///
/// The cache is asked first: if it holds everything, there is no network traffic at all.
/// `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured.
///
/// # Errors
/// Nothing cached and no answer from the hub within [`online::PATIENCE`], no such repository, or
/// one without a checkpoint in safetensors.
#[cfg(feature = "hub")]
pub(super) fn snapshot(id: &str) -> Result<PathBuf> {
    online::Hub::from_env().snapshot(id)
}

/// Built without the `hub` feature there is no hub to ask.
///
/// # Errors
/// Always.
#[cfg(not(feature = "hub"))]
pub(super) fn snapshot(id: &str) -> Result<PathBuf> {
    Err(fail(id, format!("this build has no hub support (feature `hub`); {WAYS_OUT}")))
}

/// The directory that [`snapshot`] returns, where the cache holds all of it.
pub(super) fn cached(id: &str) -> Option<PathBuf> {
    #[cfg(feature = "hub")]
    return online::Hub::from_env().cached(id);
    #[cfg(not(feature = "hub"))]
    return snapshot(id).ok();
}

/// The cache's directory.
pub(super) fn cache() -> Option<PathBuf> {
    #[cfg(feature = "hub")]
    return hf_hub::HFClientBuilder::new().build().ok().map(|client| client.cache_dir().into());
    #[cfg(not(feature = "hub"))]
    return None;
}

#[cfg(feature = "hub")]
mod online {
    use std::{
        path::{Path, PathBuf},
        sync::mpsc,
        time::Duration,
    };

    use hf_hub::{
        HFClientSync, HFError, HFRepositorySync, RepoTypeModel,
        progress::{DownloadEvent, ProgressEvent, ProgressHandler},
    };
    use indicatif::{ProgressBar, ProgressStyle};

    use super::{WAYS_OUT, fail};
    use crate::{
        error::Result,
        weights::directory::{self, INDEX},
    };

    type Repo = HFRepositorySync<RepoTypeModel>;

    /// How long the hub's first answer may take. A dropped packet would else hold the user for
    /// minutes.
    pub(super) const PATIENCE: Duration = Duration::from_secs(10);

    /// Where to look; `None` is what the environment says.
    #[derive(Default)]
    pub(super) struct Hub {
        pub cache: Option<PathBuf>,
        pub endpoint: Option<String>,
        pub offline: bool,
        pub patience: Duration,
    }

    impl Hub {
        pub(super) fn from_env() -> Self {
            let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| !matches!(&*v, "" | "0"));
            Self { offline, patience: PATIENCE, ..Self::default() }
        }

        pub(super) fn snapshot(&self, id: &str) -> Result<PathBuf> {
            let repo = self.repo(id).map_err(|e| fail(id, e))?;
            if let Some(dir) = Self::whole(&repo) {
                return Ok(dir);
            }
            if self.offline {
                return Err(unreachable(id, "HF_HUB_OFFLINE is set"));
            }
            let dir = self.first_contact(&repo, id)?;
            download(&repo, &dir).map_err(|e| explain(id, &e))?;
            Ok(dir)
        }

        pub(super) fn cached(&self, id: &str) -> Option<PathBuf> {
            Self::whole(&self.repo(id).ok()?)
        }

        /// The snapshot in the cache, where nothing of it is missing.
        fn whole(repo: &Repo) -> Option<PathBuf> {
            let file = repo.download_file().filename("config.json").local_files_only(true).send();
            file.ok()?.parent().filter(|dir| directory::complete(dir)).map(Path::to_path_buf)
        }

        fn repo(&self, id: &str) -> Result<Repo, HFError> {
            // The second attempt is for a hiccup; a hub that is not there gets no third.
            let mut client = hf_hub::HFClientBuilder::new().retry_max_attempts(1);
            if let Some(cache) = &self.cache {
                client = client.cache_dir(cache);
            }
            if let Some(endpoint) = &self.endpoint {
                client = client.endpoint(endpoint);
            }
            let client: HFClientSync = client.build_sync()?;
            let (owner, name) = hf_hub::split_id(id);
            Ok(client.model(owner, name))
        }

        /// Downloads config.json on a thread of its own, so that silence can be cut short, and
        /// returns the snapshot's directory.
        fn first_contact(&self, repo: &Repo, id: &str) -> Result<PathBuf> {
            let (sender, answer) = mpsc::channel();
            let repo = repo.clone();
            std::thread::spawn(move || {
                let _ = sender.send(repo.download_file().filename("config.json").send());
            });
            let file = match answer.recv_timeout(self.patience) {
                Ok(result) => result.map_err(|e| explain(id, &e))?,
                Err(_) => {
                    let seconds = self.patience.as_secs();
                    return Err(unreachable(id, &format!("no answer in {seconds} s")));
                }
            };
            file.parent().map(Path::to_path_buf).ok_or_else(|| fail(id, "no snapshot directory"))
        }
    }

    /// Brings what the checkpoint consists of into the snapshot `dir`.
    fn download(repo: &Repo, dir: &Path) -> Result<(), HFError> {
        // All from one commit, even if the branch moves meanwhile.
        let commit = dir.file_name().map(|name| name.to_string_lossy().into_owned());
        let fetch = |name: &str| fetch(repo, name, commit.clone());
        fetch("tokenizer.json")?;
        for name in [
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "chat_template.jinja",
            "chat_template.json",
            // The one that is taken without being asked for.
            "additional_chat_templates/tool_use.jinja",
        ] {
            optional(fetch(name))?;
        }
        if optional(fetch("model.safetensors"))? {
            return Ok(());
        }
        fetch(INDEX)?;
        // A malformed index is reported, with its file, when the directory is opened.
        let shards = directory::read_index(&dir.join(INDEX)).unwrap_or_default();
        let mut shards: Vec<_> = shards.into_values().collect();
        shards.sort();
        shards.dedup();
        shards.iter().try_for_each(|shard| fetch(shard))
    }

    fn fetch(repo: &Repo, name: &str, commit: Option<String>) -> Result<(), HFError> {
        let request = repo.download_file().filename(name).maybe_revision(commit);
        request.progress(Bar::new(name)).send().map(drop)
    }

    /// `false` where the repository has no such file.
    fn optional(result: Result<(), HFError>) -> Result<bool, HFError> {
        match result {
            Ok(()) => Ok(true),
            Err(HFError::EntryNotFound { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    fn unreachable(id: &str, why: &str) -> anyhow::Error {
        fail(id, format!("not cached, and the hub cannot be reached ({why}); {WAYS_OUT}"))
    }

    fn explain(id: &str, error: &HFError) -> anyhow::Error {
        match error {
            HFError::RepoNotFound { .. }
            | HFError::AuthRequired { .. }
            | HFError::Forbidden { .. } => {
                fail(id, "the hub has no such repository, or it needs HF_TOKEN")
            }
            HFError::EntryNotFound { path, .. } => {
                fail(id, format!("the hub has no {path} of it: is it a checkpoint in safetensors?"))
            }
            HFError::Io(e) => fail(id, format!("the hub cache cannot be written: {e}")),
            other => unreachable(id, other.to_string().lines().next().unwrap_or_default()),
        }
    }

    /// One file's progress on stderr; hidden where that is no terminal.
    struct Bar(ProgressBar);

    impl Bar {
        fn new(name: &str) -> Self {
            let style = ProgressStyle::with_template("{msg} {bytes}/{total_bytes} {bar:30} {eta}");
            let bar = ProgressBar::new(0).with_message(name.to_string());
            Self(match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            })
        }
    }

    impl ProgressHandler for Bar {
        fn on_progress(&self, event: &ProgressEvent) {
            let ProgressEvent::Download(event) = event else { return };
            match event {
                DownloadEvent::Start { total_bytes, .. } => self.0.set_length(*total_bytes),
                DownloadEvent::Progress { files } => {
                    self.0.set_position(files.iter().map(|f| f.bytes_completed).sum());
                }
                DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                    self.0.set_position(*bytes_completed);
                }
                DownloadEvent::Complete => self.0.finish_and_clear(),
            }
        }
    }
}

#[cfg(all(test, feature = "hub"))]
mod tests {
    use std::{
        fs,
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
        path::Path,
        time::{Duration, Instant},
    };

    use super::online::Hub;

    const ID: &str = "owner/name";
    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn hub(cache: &Path, endpoint: &str, offline: bool) -> Hub {
        Hub {
            cache: Some(cache.into()),
            endpoint: Some(endpoint.into()),
            offline,
            patience: Duration::from_secs(2),
        }
    }

    /// The cache layout of huggingface_hub, with these (empty) files in the snapshot.
    fn fill(cache: &Path, files: &[(&str, &str)]) -> std::path::PathBuf {
        let repo = cache.join("models--owner--name");
        let snapshot = repo.join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::write(repo.join("refs/main"), COMMIT).unwrap();
        for (name, text) in files {
            fs::write(snapshot.join(name), text).unwrap();
        }
        snapshot
    }

    #[test]
    fn a_complete_cache_needs_no_network() {
        let cache = tempfile::tempdir().unwrap();
        let files = [("config.json", ""), ("tokenizer.json", ""), ("model.safetensors", "")];
        let snapshot = fill(cache.path(), &files);
        let found = hub(cache.path(), "http://127.0.0.1:1", false).snapshot(ID).unwrap();
        assert_eq!(found, snapshot);
    }

    #[test]
    fn a_cache_without_every_shard_is_not_complete() {
        let cache = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let mut files = vec![
            ("config.json", ""),
            ("tokenizer.json", ""),
            ("model.safetensors.index.json", index),
            ("1.safetensors", ""),
        ];
        fill(cache.path(), &files);
        let offline = hub(cache.path(), "http://127.0.0.1:1", true);
        let error = offline.snapshot(ID).unwrap_err().to_string();
        assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
        files.push(("2.safetensors", ""));
        fill(cache.path(), &files);
        offline.snapshot(ID).unwrap();
    }

    #[test]
    fn an_unreachable_or_silent_hub_is_one_prompt_error() {
        let cache = tempfile::tempdir().unwrap();
        // Listens, and never answers.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent_url = format!("http://{}", silent.local_addr().unwrap());
        for endpoint in ["http://127.0.0.1:1", "http://no-such-host.invalid", &silent_url] {
            let start = Instant::now();
            let error = hub(cache.path(), endpoint, false).snapshot(ID).unwrap_err().to_string();
            assert!(start.elapsed() < Duration::from_secs(5), "{endpoint}: {error}");
            assert!(!error.contains('\n'), "{error}");
            for part in ["owner/name", "--model DIR", "fetch-weights.sh", "--model synthetic"] {
                assert!(error.contains(part), "{error}");
            }
        }
    }

    /// Serves these files as the hub does, from a thread; returns the endpoint.
    fn serve(files: &'static [(&'static str, &'static str)]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            listener.incoming().flatten().for_each(|stream| answer(stream, files));
        });
        endpoint
    }

    fn answer(mut stream: TcpStream, files: &[(&str, &str)]) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(request) = lines.next() else { return };
        lines.take_while(|line| !line.is_empty()).for_each(drop);
        let path = request.split(' ').nth(1).unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        let found = files.iter().find(|file| file.0 == name && path.starts_with("/owner/name/"));
        let (status, text) = found.map_or(("404 Not Found", ""), |file| ("200 OK", file.1));
        let body = if request.starts_with("HEAD") { "" } else { text };
        let length = text.len();
        let _ = write!(
            stream,
            "HTTP/1.1 {status}\r\nETag: \"{name}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
    }

    #[test]
    fn what_is_not_cached_is_downloaded_once() {
        const INDEX: &str = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let endpoint = serve(&[
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
            ("model.safetensors.index.json", INDEX),
            ("1.safetensors", "first"),
            ("2.safetensors", "second"),
        ]);
        let cache = tempfile::tempdir().unwrap();
        let dir = hub(cache.path(), &endpoint, false).snapshot(ID).unwrap();
        assert_eq!(fs::read_to_string(dir.join("2.safetensors")).unwrap(), "second");
        let offline = hub(cache.path(), "http://127.0.0.1:1", true);
        assert_eq!(offline.snapshot(ID).unwrap(), dir);

        let error = hub(cache.path(), &endpoint, false).snapshot("owner/other").unwrap_err();
        assert!(error.to_string().contains("owner/other: the hub has no config.json"), "{error}");
    }
}
