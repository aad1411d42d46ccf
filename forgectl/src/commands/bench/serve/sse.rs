//! Server-sent events, as far as OpenAI's streams use them: the data of one event at a time, from bytes as they come.

/// Longest event: a chunk of a stream is a few hundred bytes, so a longer one is no stream of chunks.
const MAX_EVENT_BYTES: usize = 4 << 20;

/// Takes bytes, gives the data of finished events.
#[derive(Debug, Default)]
pub struct Events {
    buffer: Vec<u8>,
}

impl Events {
    /// Adds bytes and returns the data of every event they finish.
    ///
    /// # Errors
    /// An event that does not end.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, String> {
        self.buffer.extend_from_slice(bytes);
        let mut found = Vec::new();
        while let Some((end, next)) = blank_line(&self.buffer) {
            let event: Vec<u8> = self.buffer.drain(..next).collect();
            found.extend(data(&event[..end]));
        }
        if self.buffer.len() > MAX_EVENT_BYTES {
            return Err(format!("an event of more than {MAX_EVENT_BYTES} bytes"));
        }
        Ok(found)
    }
}

/// Where the first event ends, and where the next begins.
fn blank_line(bytes: &[u8]) -> Option<(usize, usize)> {
    let ends = [b"\n\n".as_slice(), b"\r\n\r\n"];
    let found = ends.iter().filter_map(|end| {
        let at = bytes.windows(end.len()).position(|window| window == *end)?;
        Some((at, at + end.len()))
    });
    found.min()
}

/// The `data:` lines of an event; comments and other fields are passed over.
fn data(event: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(event);
    let lines: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("data:")).map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_however_the_bytes_are_cut() {
        let stream = b": hello\n\ndata: {\"a\": 1}\n\ndata:x\r\n\r\nevent: e\ndata: one\ndata: two\n\ndata: [DONE]\n\nrest";
        for size in [1, 2, 7, stream.len()] {
            let mut events = Events::default();
            let found: Vec<String> = stream.chunks(size).flat_map(|bytes| events.push(bytes).expect("short")).collect();
            assert_eq!(found, ["{\"a\": 1}", "x", "one\ntwo", "[DONE]"], "{size}");
        }
    }

    #[test]
    fn an_event_that_does_not_end_is_refused() {
        let mut events = Events::default();
        assert!(events.push(&vec![b'x'; MAX_EVENT_BYTES + 1]).is_err());
    }
}
