//! A small HTTP/1.1 server on loopback that plays hub and package index, with the faults a real
//! network has. Every connection serves one request and is closed.

#![allow(dead_code)] // each test file uses its own part

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forge_store::{Digest, ForgeHome, PullEvent, PullOptions, PullProgress, Store, Waits};

/// One request as the server saw it: `GET /path?query` and its headers, names in lower case.
#[derive(Debug, Clone)]
pub struct Seen {
    pub path: String,
    pub headers: HashMap<String, String>,
}

/// How one path answers. Each `Vec` of faults is used up from the front, one per request.
#[derive(Clone, Default)]
pub struct Page {
    pub body: Vec<u8>,
    pub content_type: &'static str,
    pub etag: Option<&'static str>,
    pub faults: Vec<Fault>,
    /// Digest sent as the hub does, before a redirect.
    pub linked_etag: Option<String>,
    /// The token without which the page answers 401.
    pub token: Option<&'static str>,
}

impl Page {
    fn admits(&self, headers: &HashMap<String, String>) -> bool {
        let given = headers.get("authorization").map(String::as_str);
        self.token.is_none_or(|token| given == Some(&format!("Bearer {token}")))
    }
}

/// What goes wrong with one request.
#[derive(Clone)]
pub enum Fault {
    /// Sends this many bytes of the body, then cuts the connection.
    CutAfter(usize),
    /// Sends this many bytes of the body, then nothing for this long.
    StallAfter(usize, Duration),
    /// Answers this status, with these extra header lines.
    Status(u16, &'static str),
    /// Answers nothing at all for this long.
    Silence(Duration),
    /// Redirects to an address.
    Redirect(String),
    /// Sends this many bytes of the body, then the whole server is away for this long.
    GoAway(usize, Duration),
    /// Ignores the range that was asked for, and cuts the connection after this many bytes.
    StartOver(usize),
}

/// The server. It lives as long as the test process.
pub struct Server {
    pub url: String,
    pages: Arc<Mutex<HashMap<String, Page>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let pages: Arc<Mutex<HashMap<String, Page>>> = Arc::default();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let away: Arc<Mutex<Option<Duration>>> = Arc::default();
        let shared = (pages.clone(), seen.clone(), away);
        std::thread::spawn(move || {
            let mut listener = listener;
            loop {
                let Ok((stream, _)) = listener.accept() else { continue };
                if let Some(pause) = shared.2.lock().unwrap().take() {
                    drop(stream);
                    drop(listener);
                    std::thread::sleep(pause);
                    listener = TcpListener::bind(address).unwrap();
                    continue;
                }
                let (pages, seen, away) = shared.clone();
                // A client that hangs up early is part of the tests.
                std::thread::spawn(move || {
                    let gone = serve(stream, &pages, &seen);
                    if let Ok(Some(pause)) = gone {
                        *away.lock().unwrap() = Some(pause);
                        // Wakes the listener, which then closes.
                        let _ = TcpStream::connect(address);
                    }
                });
            }
        });
        Self { url, pages, seen }
    }

    pub fn put(&self, path: &str, page: Page) {
        self.pages.lock().unwrap().insert(path.into(), page);
    }

    pub fn put_body(&self, path: &str, body: &[u8]) {
        self.put(path, Page { body: body.into(), ..Page::default() });
    }

    pub fn seen(&self, path: &str) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|one| one.path.split('?').next() == Some(path)).cloned().collect()
    }

    /// Publishes a repository on the hub part; LFS digests are given for weights only, as there.
    pub fn put_repo(&self, repo: &str, files: &[(&str, &[u8])]) {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let siblings: Vec<_> = files
            .iter()
            .map(|(name, body)| {
                let mut sibling = serde_json::json!({"rfilename": name, "size": body.len()});
                if name.ends_with(".gguf") || name.ends_with(".safetensors") {
                    let lfs = serde_json::json!({
                        "sha256": Digest::of(body).to_string(), "size": body.len(), "pointerSize": 134
                    });
                    sibling["lfs"] = lfs;
                }
                sibling
            })
            .collect();
        let listing = serde_json::json!({
            "id": repo, "sha": commit, "siblings": siblings, "tags": ["license:apache-2.0"]
        });
        for revision in ["main", "v1"] {
            self.put_body(&format!("/api/models/{repo}/revision/{revision}"), listing.to_string().as_bytes());
        }
        for (name, body) in files {
            self.put(
                &format!("/{repo}/resolve/{commit}/{name}"),
                Page { body: (*body).into(), etag: Some("\"tag-1\""), ..Page::default() },
            );
        }
    }

    pub fn resolve_path(&self, repo: &str, file: &str) -> String {
        format!("/{repo}/resolve/0123456789abcdef0123456789abcdef01234567/{file}")
    }

    pub fn with_faults(&self, path: &str, faults: Vec<Fault>) {
        self.pages.lock().unwrap().get_mut(path).expect("a page of that path").faults = faults;
    }

    pub fn require_token(&self, path: &str, token: &'static str) {
        self.pages.lock().unwrap().get_mut(path).expect("a page of that path").token = Some(token);
    }

    /// Publishes a wheel on the index part, below `/simple`.
    pub fn put_package(&self, name: &str, version: &str, wheel: &[u8]) {
        let filename = format!("{}-{version}-py3-none-any.whl", name.replace('-', "_"));
        let listing = serde_json::json!({"meta": {"api-version": "1.1"}, "name": name, "files": [{
            "filename": filename, "url": format!("../../files/{filename}"),
            "hashes": {"sha256": Digest::of(wheel).to_string()}, "yanked": false
        }]});
        self.put(
            &format!("/simple/{name}/"),
            Page { body: listing.to_string().into_bytes(), content_type: "application/vnd.pypi.simple.v1+json", ..Page::default() },
        );
        self.put(&format!("/files/{filename}"), Page { body: wheel.into(), etag: Some("\"wheel\""), ..Page::default() });
    }
}

fn serve(stream: TcpStream, pages: &Mutex<HashMap<String, Page>>, seen: &Mutex<Vec<Seen>>) -> std::io::Result<Option<Duration>> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let Some(path) = line.split(' ').nth(1).map(str::to_owned) else {
        return Ok(None);
    };
    let mut headers = HashMap::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    seen.lock().unwrap().push(Seen { path: path.clone(), headers: headers.clone() });
    let bare = path.split('?').next().unwrap_or(&path);
    let (page, fault) = {
        let mut pages = pages.lock().unwrap();
        match pages.get_mut(bare) {
            Some(page) => {
                let fault = (!page.faults.is_empty()).then(|| page.faults.remove(0));
                (Some(page.clone()), fault)
            }
            None => (None, None),
        }
    };
    let away = match &fault {
        Some(Fault::GoAway(_, pause)) => Some(*pause),
        _ => None,
    };
    match page {
        None => head(&stream, 404, "Content-Length: 0\r\n")?,
        Some(page) if !page.admits(&headers) => head(&stream, 401, "Content-Length: 0\r\n")?,
        Some(page) => answer(&stream, &page, fault, &headers)?,
    }
    Ok(away)
}

fn answer(mut stream: &TcpStream, page: &Page, fault: Option<Fault>, headers: &HashMap<String, String>) -> std::io::Result<()> {
    match &fault {
        Some(Fault::Status(status, extra)) => {
            return head(stream, *status, &format!("Content-Length: 0\r\n{extra}"));
        }
        Some(Fault::Silence(pause)) => {
            std::thread::sleep(*pause);
            return Ok(());
        }
        Some(Fault::Redirect(to)) => {
            let linked = page.linked_etag.iter().map(|tag| format!("X-Linked-ETag: \"{tag}\"\r\n"));
            let linked: String = linked.collect();
            return head(stream, 302, &format!("Content-Length: 0\r\n{linked}Location: {to}\r\n"));
        }
        _ => {}
    }
    let total = page.body.len();
    let tag_fits = match headers.get("if-range") {
        Some(tag) => Some(tag.as_str()) == page.etag,
        None => true,
    };
    let range = headers
        .get("range")
        .filter(|_| tag_fits && !matches!(fault, Some(Fault::StartOver(_))))
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let first = range.and_then(|(first, _)| first.parse::<usize>().ok());
    let end = range.and_then(|(_, last)| last.parse::<usize>().ok()).map_or(total, |last| total.min(last + 1));
    let mut extra = String::new();
    if let Some(tag) = page.etag {
        extra.push_str(&format!("ETag: {tag}\r\n"));
    }
    if !page.content_type.is_empty() {
        extra.push_str(&format!("Content-Type: {}\r\n", page.content_type));
    }
    let body = match first {
        Some(first) if first >= total => {
            return head(stream, 416, &format!("Content-Range: bytes */{total}\r\nContent-Length: 0\r\n"));
        }
        Some(first) => {
            extra.push_str(&format!("Content-Range: bytes {first}-{}/{total}\r\n", end - 1));
            &page.body[first..end]
        }
        None => &page.body[..],
    };
    extra.push_str(&format!("Content-Length: {}\r\n", body.len()));
    head(stream, if first.is_some() { 206 } else { 200 }, &extra)?;
    match fault {
        Some(Fault::CutAfter(count) | Fault::StartOver(count) | Fault::GoAway(count, _)) => {
            stream.write_all(&body[..count.min(body.len())])
        }
        Some(Fault::StallAfter(count, pause)) => {
            stream.write_all(&body[..count.min(body.len())])?;
            std::thread::sleep(pause);
            Ok(())
        }
        _ => stream.write_all(body),
    }
}

fn head(mut stream: &TcpStream, status: u16, extra: &str) -> std::io::Result<()> {
    stream.write_all(format!("HTTP/1.1 {status} Text\r\nConnection: close\r\n{extra}\r\n").as_bytes())
}

/// A store in a folder of its own, with options that point at a test server.
pub struct Bench {
    pub folder: tempfile::TempDir,
    pub home: ForgeHome,
    pub options: PullOptions,
}

impl Bench {
    pub fn new(server: &Server) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = ForgeHome::at(folder.path());
        let options = PullOptions {
            hub_endpoint: server.url.clone(),
            package_index: Some(format!("{}/simple", server.url)),
            waits: Waits {
                connect: Duration::from_secs(2),
                answer: Duration::from_secs(2),
                stall: Duration::from_millis(400),
                retries: 3,
                first_pause: Duration::from_millis(10),
                lock: Duration::from_secs(20),
            },
            ..PullOptions::default()
        };
        Self { folder, home, options }
    }

    pub fn store(&self) -> Store {
        Store::open(&self.home).unwrap()
    }

    /// Writes the user's catalogue.
    pub fn catalogue(&self, text: &str) {
        std::fs::write(self.home.catalogue_file(), text).unwrap();
    }

    /// Names of the files in one of the store's folders, sorted.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.home.models().join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Keeps all events.
#[derive(Default)]
pub struct Recorder(pub Mutex<Vec<PullEvent>>);

impl PullProgress for Recorder {
    fn event(&self, event: PullEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Recorder {
    pub fn count(&self, test: impl Fn(&PullEvent) -> bool) -> usize {
        self.0.lock().unwrap().iter().filter(|event| test(event)).count()
    }

    pub fn text(&self) -> String {
        format!("{:?}", self.0.lock().unwrap())
    }
}

/// Bytes that differ everywhere, so that a wrong offset shows.
pub fn weights(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// A zip archive of these entries, deflated.
pub fn wheel(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, body) in entries {
        let options = zip::write::SimpleFileOptions::default();
        archive.start_file(*name, options).unwrap();
        archive.write_all(body).unwrap();
    }
    archive.finish().unwrap().into_inner()
}
