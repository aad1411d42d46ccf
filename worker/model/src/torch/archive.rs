//! The directory of a zip archive whose entries are stored, neither compressed nor encrypted, as torch.save writes them.
//!
//! Not a zip library: it finds entries in a mapped file and hands out their ranges, and it is strict where libraries are
//! lenient. Names are there once, entries do not overlap, and what the directory says of an entry its own header says
//! too. Checksums are not read, since that would read all weights.

use std::collections::BTreeMap;
use std::ops::Range;

use super::malformed;
use crate::error::{ModelError, Result};

const END: u32 = 0x0605_4b50;
const END_BYTES: usize = 22;
const END64_LOCATOR: u32 = 0x0706_4b50;
const END64_LOCATOR_BYTES: usize = 20;
const END64: u32 = 0x0606_4b50;
const END64_BYTES: usize = 56;
const DIRECTORY_ENTRY: u32 = 0x0201_4b50;
const DIRECTORY_ENTRY_BYTES: usize = 46;
const LOCAL_HEADER: u32 = 0x0403_4b50;
const LOCAL_HEADER_BYTES: usize = 30;
/// Of a directory entry's extra fields: 64-bit sizes.
const ZIP64_FIELD: u16 = 1;
/// Flags of encrypted contents: plain, strong, and with a masked directory.
const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;
const STORED: u16 = 0;
/// The most a comment behind the archive can have.
const MAX_COMMENT_BYTES: usize = u16::MAX as usize;

/// Entries by name.
pub(super) struct Archive<'a> {
    entries: BTreeMap<&'a str, Contents>,
}

/// Where an entry's contents lie, and why they cannot be read where they cannot: another entry may do without.
struct Contents {
    range: Range<usize>,
    unreadable: Option<String>,
}

/// Where the directory lies and how many entries it has.
struct Directory {
    range: Range<usize>,
    entries: u64,
}

impl<'a> Archive<'a> {
    /// # Errors
    /// Whatever is not a whole archive of stored entries, with the entry's name.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self> {
        let directory = find_directory(bytes)?;
        if directory.entries > (directory.range.len() / DIRECTORY_ENTRY_BYTES) as u64 {
            return Err(malformed(format!(
                "the archive says it has {} entries, its directory of {} bytes cannot",
                directory.entries,
                directory.range.len()
            )));
        }
        let mut cursor = Cursor { bytes: &bytes[directory.range.clone()], offset: directory.range.start };
        let mut entries = BTreeMap::new();
        let mut occupied = Vec::new();
        for _ in 0..directory.entries {
            let entry = Entry::read(&mut cursor)?;
            let whole = entry.place(bytes, directory.range.start)?;
            let contents = Contents { range: whole.end - entry.packed..whole.end, unreadable: entry.unreadable };
            if entries.insert(entry.name, contents).is_some() {
                return Err(malformed(format!("the archive has entry {:?} twice", entry.name)));
            }
            occupied.push((whole, entry.name));
        }
        occupied.sort_by_key(|(range, _)| range.start);
        for pair in occupied.windows(2) {
            if pair[0].0.end > pair[1].0.start {
                return Err(malformed(format!("entries {:?} and {:?} of the archive overlap", pair[0].1, pair[1].1)));
            }
        }
        Ok(Archive { entries })
    }

    /// The place of an entry's contents; `None` where there is no such entry.
    ///
    /// # Errors
    /// An entry that is compressed or encrypted.
    pub(super) fn get(&self, name: &str) -> Result<Option<Range<usize>>> {
        let Some(Contents { range, unreadable }) = self.entries.get(name) else { return Ok(None) };
        match unreadable {
            None => Ok(Some(range.clone())),
            Some(what) => Err(ModelError::Unsupported {
                what: format!("entry {name:?} of the {} is {what}, which", super::FORMAT),
                remedy: "save the model again with torch.save or, better, as safetensors".to_owned(),
            }),
        }
    }

    /// Whether there is such an entry.
    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.entries.keys().copied()
    }
}

/// Little-endian numbers from a part of the file that begins at `offset`.
struct Cursor<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn at(bytes: &'a [u8], offset: usize) -> Self {
        Cursor { bytes: bytes.get(offset..).unwrap_or_default(), offset }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        match self.bytes.split_at_checked(count) {
            Some((taken, rest)) => {
                (self.bytes, self.offset) = (rest, self.offset + count);
                Ok(taken)
            }
            None => Err(malformed(format!("the archive's directory is cut off at byte {}", self.offset + self.bytes.len()))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

/// Finds the directory by the record at the archive's end.
fn find_directory(bytes: &[u8]) -> Result<Directory> {
    let earliest = bytes.len().saturating_sub(END_BYTES + MAX_COMMENT_BYTES);
    let latest = bytes.len().checked_sub(END_BYTES);
    let is_end = |&at: &usize| {
        bytes[at..].starts_with(&END.to_le_bytes())
            && bytes.len() - at - END_BYTES == usize::from(bytes[at + 20]) + 256 * usize::from(bytes[at + 21])
    };
    let end = latest.and_then(|latest| (earliest..=latest).rev().find(is_end));
    let end = end.ok_or_else(|| malformed("the zip archive has no end: it is cut off; download it again"))?;
    let mut cursor = Cursor::at(bytes, end + 4);
    let disks = [cursor.u16()?, cursor.u16()?];
    let counts = [cursor.u16()?, cursor.u16()?];
    let (size, offset) = (cursor.u32()?, cursor.u32()?);
    if disks != [0, 0] || counts[0] != counts[1] {
        return Err(malformed("the zip archive is one of several volumes"));
    }
    let small = (u64::from(size), u64::from(offset), u64::from(counts[1]));
    let locator = end.checked_sub(END64_LOCATOR_BYTES).filter(|&at| bytes[at..].starts_with(&END64_LOCATOR.to_le_bytes()));
    let (limit, (size, offset, entries)) = match locator {
        None => (end, small),
        Some(locator) => find_large_directory(bytes, locator)?,
    };
    let start = usize::try_from(offset).ok();
    let range = start.zip(usize::try_from(size).ok()).and_then(|(start, size)| Some(start..start.checked_add(size)?));
    match range {
        Some(range) if range.end <= limit => Ok(Directory { range, entries }),
        _ => Err(malformed(format!("the archive's directory of {size} bytes at byte {offset} is not in the file"))),
    }
}

/// The 64-bit record: where it begins, and size, offset and entries of the directory.
fn find_large_directory(bytes: &[u8], locator: usize) -> Result<(usize, (u64, u64, u64))> {
    let at = Cursor::at(bytes, locator + 8).u64()?;
    let record = usize::try_from(at).ok().filter(|&at| at.checked_add(END64_BYTES).is_some_and(|end| end <= locator));
    let record = record.filter(|&at| bytes[at..].starts_with(&END64.to_le_bytes()));
    let record = record.ok_or_else(|| malformed(format!("the archive's 64-bit end record is not at byte {at}")))?;
    let mut cursor = Cursor::at(bytes, record + 16);
    let disks = [cursor.u32()?, cursor.u32()?];
    let counts = [cursor.u64()?, cursor.u64()?];
    if disks != [0, 0] || counts[0] != counts[1] {
        return Err(malformed("the zip archive is one of several volumes"));
    }
    Ok((record, (cursor.u64()?, cursor.u64()?, counts[1])))
}

/// An entry of the directory.
struct Entry<'a> {
    name: &'a str,
    /// Bytes of its contents in the file.
    packed: usize,
    header: usize,
    method: u16,
    unreadable: Option<String>,
}

impl<'a> Entry<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self> {
        let at = cursor.offset;
        if cursor.u32()? != DIRECTORY_ENTRY {
            return Err(malformed(format!("there is no entry of the archive's directory at byte {at}")));
        }
        cursor.take(4)?;
        let (flags, method) = (cursor.u16()?, cursor.u16()?);
        cursor.take(8)?;
        let (packed, size) = (cursor.u32()?, cursor.u32()?);
        let (name_bytes, extra_bytes, comment_bytes) = (cursor.u16()?, cursor.u16()?, cursor.u16()?);
        cursor.take(8)?;
        let header = cursor.u32()?;
        let name = cursor.take(name_bytes.into())?;
        let name =
            std::str::from_utf8(name).map_err(|_| malformed(format!("the name of the archive's entry at byte {at} is not UTF-8")))?;
        let extra = cursor.take(extra_bytes.into())?;
        cursor.take(comment_bytes.into())?;
        let unreadable = match method {
            _ if flags & ENCRYPTED != 0 => Some("encrypted".to_owned()),
            STORED => None,
            method => Some(format!("compressed (method {method})")),
        };
        let [size, packed, header] = widen(extra, [size, packed, header])
            .ok_or_else(|| malformed(format!("entry {name:?} of the archive has no 64-bit sizes where it says so")))?;
        if unreadable.is_none() && packed != size {
            return Err(malformed(format!("entry {name:?} of the archive is stored, but in {packed} bytes instead of {size}")));
        }
        let beyond = || malformed(format!("entry {name:?} of the archive is larger than this machine's memory"));
        let number = |number: u64| usize::try_from(number).map_err(|_| beyond());
        Ok(Entry { name, packed: number(packed)?, header: number(header)?, method, unreadable })
    }

    /// The bytes of header and contents.
    fn place(&self, bytes: &[u8], limit: usize) -> Result<Range<usize>> {
        let wrong = |what: &str| malformed(format!("entry {:?} of the archive {what}", self.name));
        let header = bytes.get(self.header..limit).and_then(|rest| rest.split_at_checked(LOCAL_HEADER_BYTES));
        let (header, rest) = header.ok_or_else(|| wrong(&format!("has no header at byte {}: the file is cut off", self.header)))?;
        let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (name_bytes, extra_bytes) = (usize::from(number(26)), usize::from(number(28)));
        if !header.starts_with(&LOCAL_HEADER.to_le_bytes())
            || number(8) != self.method
            || rest.get(..name_bytes) != Some(self.name.as_bytes())
        {
            return Err(wrong("has another header than the directory says"));
        }
        let start = self.header + LOCAL_HEADER_BYTES + name_bytes + extra_bytes;
        match start.checked_add(self.packed) {
            Some(end) if end <= limit => Ok(self.header..end),
            _ => Err(wrong(&format!("has {} bytes from byte {start}, more than the file", self.packed))),
        }
    }
}

/// Replaces the numbers that say so by those of the 64-bit field, which has them in this order.
fn widen(extra: &[u8], numbers: [u32; 3]) -> Option<[u64; 3]> {
    let mut wide = numbers.map(u64::from);
    if !numbers.contains(&u32::MAX) {
        return Some(wide);
    }
    let mut cursor = Cursor { bytes: extra, offset: 0 };
    let mut field = loop {
        let (kind, length) = (cursor.u16().ok()?, cursor.u16().ok()?);
        let bytes = cursor.take(length.into()).ok()?;
        if kind == ZIP64_FIELD {
            break Cursor { bytes, offset: 0 };
        }
    };
    for number in wide.iter_mut().filter(|number| **number == u64::from(u32::MAX)) {
        *number = field.u64().ok()?;
    }
    Some(wide)
}
