//! `BlockManager`: who holds which block of the paged KV cache.
//!
//! A block is a fixed number of token slots. It is free, held by one or more block tables, or free but still
//! known by the hash of the tokens it holds, so that a later prompt with the same prefix takes it back. When
//! memory is short the longest unused of those is forgotten first.
//!
//! What it is not: it touches no KV memory (copies are handed to the step plan) and knows no request.
//!
//! Invariants (kept by `check`, property-tested): a block's reference count is the number of table entries
//! that name it; every block is held, cached or free, never two of these; a hash names at most one block.

use std::collections::{BTreeMap, HashMap};

use forge_text::PrefixHash;

/// No block is left; nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} KV blocks are needed and {free} are free")]
pub struct OutOfBlocks {
    /// Blocks the call wanted.
    pub needed: usize,
    /// Blocks there were.
    pub free: usize,
}

/// The blocks of one sequence in order: entry i holds positions `i * block_size .. (i + 1) * block_size`.
///
/// It is emptied by [`BlockManager::release`]; dropping a filled table would leak its blocks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// The block ids.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether it holds no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The KV slot of a position: block · block_size + offset.
    pub fn slot(&self, position: usize, block_size: usize) -> u32 {
        self.blocks[position / block_size] * block_size as u32 + (position % block_size) as u32
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// Table entries that name it.
    references: u32,
    /// Hash of its content, if it is full and known to the prefix cache.
    hash: Option<PrefixHash>,
    /// When it was last let go; key in `reusable` while nobody holds it.
    released_at: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct BlockManager {
    block_size: usize,
    blocks: Vec<Block>,
    /// Free blocks without content; the last is taken first.
    free: Vec<u32>,
    /// Content of full blocks.
    by_hash: HashMap<PrefixHash, u32>,
    /// Blocks that nobody holds but whose content is known, longest unused first.
    reusable: BTreeMap<u64, u32>,
    releases: u64,
    /// What became known and forgotten since [`Self::take_changes`]; nothing is noted while nobody asks.
    changes: Option<Vec<PrefixChange>>,
}

/// A block's content became known to the prefix cache, or is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixChange {
    /// It can be reused.
    Stored(PrefixHash),
    /// It cannot any more.
    Removed(PrefixHash),
}

impl BlockManager {
    /// `block_count` blocks of `block_size` slots, all free.
    pub fn new(block_count: usize, block_size: usize) -> Self {
        BlockManager {
            block_size,
            blocks: vec![Block::default(); block_count],
            free: (0..block_count as u32).rev().collect(),
            by_hash: HashMap::new(),
            reusable: BTreeMap::new(),
            releases: 0,
            changes: None,
        }
    }

    /// Token slots per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be taken, those with reusable content included.
    pub fn available(&self) -> usize {
        self.free.len() + self.reusable.len()
    }

    /// Blocks held by tables.
    pub fn used(&self) -> usize {
        self.total() - self.available()
    }

    /// Blocks whose content the prefix cache knows, held or not.
    pub fn cached(&self) -> usize {
        self.by_hash.len()
    }

    /// Blocks for `slots` token slots.
    pub fn blocks_for(&self, slots: usize) -> usize {
        slots.div_ceil(self.block_size)
    }

    /// Begins or ends to note changes of what the prefix cache knows.
    pub fn note_changes(&mut self, on: bool) {
        match on {
            true => self.changes = self.changes.take().or(Some(Vec::new())),
            false => self.changes = None,
        }
    }

    /// What was noted since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<PrefixChange> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// All content that the prefix cache knows, in no order.
    pub fn known(&self) -> impl Iterator<Item = PrefixHash> + '_ {
        self.by_hash.keys().copied()
    }

    fn note(&mut self, change: PrefixChange) {
        if let Some(changes) = &mut self.changes {
            changes.push(change);
        }
    }

    /// How many of `hashes`, from the first on, are cached; and how many of those blocks nobody holds now, so
    /// that taking them uses up availability.
    pub fn lookup(&self, hashes: &[PrefixHash]) -> CachedPrefix {
        let mut prefix = CachedPrefix::default();
        for hash in hashes {
            let Some(&block) = self.by_hash.get(hash) else { break };
            prefix.blocks += 1;
            prefix.unheld += usize::from(self.blocks[block as usize].references == 0);
        }
        prefix
    }

    /// Fills an empty table: the cached blocks of `hashes` (all must be cached, see [`Self::lookup`]), then
    /// fresh ones up to `slots` token slots. All or nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks`]; nothing was changed.
    pub fn start(&mut self, table: &mut BlockTable, hashes: &[PrefixHash], slots: usize) -> Result<(), OutOfBlocks> {
        debug_assert!(table.is_empty());
        let prefix = self.lookup(hashes);
        debug_assert_eq!(prefix.blocks, hashes.len());
        let needed = self.blocks_for(slots).saturating_sub(prefix.blocks) + prefix.unheld;
        if needed > self.available() {
            return Err(OutOfBlocks { needed, free: self.available() });
        }
        for hash in &hashes[..prefix.blocks] {
            let block = self.by_hash[hash];
            self.hold(block);
            table.blocks.push(block);
        }
        self.extend(table, slots);
        Ok(())
    }

    /// Makes positions `from..slots` of a table writable: adds fresh blocks and replaces blocks in that range
    /// which others hold too. Returns the copies (from, to) to do, in this order, before the step. All or nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks`]; nothing was changed.
    pub fn reserve(&mut self, table: &mut BlockTable, from: usize, slots: usize) -> Result<Vec<(u32, u32)>, OutOfBlocks> {
        let first = from / self.block_size;
        let shared = (first..table.len()).filter(|&index| self.blocks[table.blocks[index] as usize].references > 1).count();
        let needed = self.blocks_for(slots).saturating_sub(table.len()) + shared;
        if needed > self.available() {
            return Err(OutOfBlocks { needed, free: self.available() });
        }
        let mut copies = Vec::new();
        for index in first..table.len() {
            let block = table.blocks[index];
            if self.blocks[block as usize].references > 1 {
                let copy = self.take();
                self.let_go(block);
                table.blocks[index] = copy;
                copies.push((block, copy));
            } else if let Some(hash) = self.blocks[block as usize].hash.take() {
                // Its content is about to change.
                self.by_hash.remove(&hash);
                self.note(PrefixChange::Removed(hash));
            }
        }
        self.extend(table, slots);
        Ok(copies)
    }

    /// A table that shares the blocks of the first `slots` slots of another.
    pub fn fork(&mut self, table: &BlockTable, slots: usize) -> BlockTable {
        let blocks = table.blocks[..self.blocks_for(slots)].to_vec();
        for &block in &blocks {
            self.hold(block);
        }
        BlockTable { blocks }
    }

    /// Makes the content of block `index` of a table, which is full and computed, known under `hash`. Where
    /// another block has the same content already, that one stays the known one.
    pub fn register(&mut self, table: &BlockTable, index: usize, hash: PrefixHash) {
        let block = table.blocks[index];
        if self.blocks[block as usize].hash.is_none() && !self.by_hash.contains_key(&hash) {
            self.by_hash.insert(hash, block);
            self.blocks[block as usize].hash = Some(hash);
            self.note(PrefixChange::Stored(hash));
        }
    }

    /// Lets go of all blocks of a table, the last first, so that a prefix outlives what follows it.
    pub fn release(&mut self, table: &mut BlockTable) {
        for block in std::mem::take(&mut table.blocks).into_iter().rev() {
            self.let_go(block);
        }
    }

    /// Grows a table to `slots` slots; the caller has checked that enough blocks are available.
    fn extend(&mut self, table: &mut BlockTable, slots: usize) {
        while table.len() < self.blocks_for(slots) {
            let block = self.take();
            table.blocks.push(block);
        }
    }

    /// A block without content, held once; the caller has checked that one is available.
    fn take(&mut self) -> u32 {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.reusable.pop_first().expect("the caller checked that a block is available");
                let hash = self.blocks[block as usize].hash.take().expect("a reusable block has a hash");
                self.by_hash.remove(&hash);
                self.note(PrefixChange::Removed(hash));
                block
            }
        };
        self.blocks[block as usize].references = 1;
        block
    }

    fn hold(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        if state.references == 0 {
            self.reusable.remove(&state.released_at);
        }
        state.references += 1;
    }

    fn let_go(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        debug_assert!(state.references > 0, "block {block} is freed twice");
        state.references -= 1;
        if state.references > 0 {
            return;
        }
        if state.hash.is_some() {
            state.released_at = self.releases;
            self.reusable.insert(self.releases, block);
            self.releases += 1;
        } else {
            self.free.push(block);
        }
    }

    /// Checks every invariant against the tables that are in use; the first broken one as text. For tests.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check<'a>(&self, tables: impl IntoIterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut references = vec![0u32; self.total()];
        for table in tables {
            for &block in &table.blocks {
                references[block as usize] += 1;
            }
        }
        let mut unheld = vec![0u32; self.total()];
        for &block in self.free.iter().chain(self.reusable.values()) {
            unheld[block as usize] += 1;
        }
        for (id, block) in self.blocks.iter().enumerate() {
            if block.references != references[id] {
                return Err(format!("block {id} counts {} references and has {}", block.references, references[id]));
            }
            if unheld[id] != u32::from(references[id] == 0) {
                return Err(format!("block {id} with {} references is free {} times", references[id], unheld[id]));
            }
            if let Some(hash) = block.hash
                && self.by_hash.get(&hash) != Some(&(id as u32))
            {
                return Err(format!("block {id} has a hash that names another block"));
            }
        }
        let hashed = self.blocks.iter().filter(|block| block.hash.is_some()).count();
        if hashed != self.by_hash.len() {
            return Err(format!("{hashed} blocks have a hash and {} hashes are known", self.by_hash.len()));
        }
        let reusable_known = self
            .reusable
            .iter()
            .all(|(at, &block)| self.blocks[block as usize].hash.is_some() && self.blocks[block as usize].released_at == *at);
        if !reusable_known || self.free.iter().any(|&block| self.blocks[block as usize].hash.is_some()) {
            return Err("a block is in the wrong free list".into());
        }
        Ok(())
    }
}

/// What the prefix cache has of a chain of hashes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CachedPrefix {
    /// Blocks, from the first on.
    pub blocks: usize,
    /// Of those, blocks that nobody holds at the moment.
    pub unheld: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use forge_text::PrefixHasher;
    use proptest::prelude::*;

    const BLOCK_SIZE: usize = 4;

    fn hashes(tokens: &[u32]) -> Vec<PrefixHash> {
        PrefixHasher::chain(&PrefixHasher::root(b"t", "n"), tokens, BLOCK_SIZE)
    }

    #[test]
    fn a_prefix_is_found_again_and_its_tail_is_forgotten_first() {
        let mut manager = BlockManager::new(4, BLOCK_SIZE);
        let chain = hashes(&[1; 12]);
        let mut table = BlockTable::default();
        manager.start(&mut table, &[], 12).unwrap();
        for (index, &hash) in chain.iter().enumerate() {
            manager.register(&table, index, hash);
        }
        let blocks = table.blocks().to_vec();
        manager.release(&mut table);
        assert_eq!((manager.used(), manager.available()), (0, 4));
        assert_eq!(manager.lookup(&chain), CachedPrefix { blocks: 3, unheld: 3 });

        // One more than the free block: the last block of the chain goes, its start stays.
        let mut other = BlockTable::default();
        manager.start(&mut other, &[], 8).unwrap();
        assert_eq!(manager.lookup(&chain).blocks, 2);
        manager.start(&mut table, &chain[..2], 8).unwrap();
        assert_eq!(table.blocks(), &blocks[..2]);
        assert_eq!(manager.start(&mut BlockTable::default(), &[], 1), Err(OutOfBlocks { needed: 1, free: 0 }));
        manager.check([&table, &other]).unwrap();
    }

    #[test]
    fn a_shared_partial_block_is_copied_by_all_but_the_last_writer() {
        let mut manager = BlockManager::new(4, BLOCK_SIZE);
        let mut first = BlockTable::default();
        manager.start(&mut first, &[], 6).unwrap();
        let mut second = manager.fork(&first, 6);
        assert_eq!(manager.used(), 2);
        let old = first.blocks()[1];
        let copies = manager.reserve(&mut first, 6, 7).unwrap();
        assert_eq!(copies, vec![(old, first.blocks()[1])]);
        assert_eq!(manager.reserve(&mut second, 6, 7).unwrap(), vec![]);
        assert_eq!(second.blocks()[1], old);
        assert_eq!(first.blocks()[0], second.blocks()[0]);
        manager.check([&first, &second]).unwrap();
    }

    #[derive(Debug, Clone)]
    enum Action {
        Start { prompt: u8, slots: usize },
        Grow { table: prop::sample::Index, by: usize },
        Fork { table: prop::sample::Index, slots: prop::sample::Index },
        Release { table: prop::sample::Index },
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            3 => (0u8..3, 1usize..24).prop_map(|(prompt, slots)| Action::Start { prompt, slots }),
            4 => (any::<prop::sample::Index>(), 1usize..6).prop_map(|(table, by)| Action::Grow { table, by }),
            2 => (any::<prop::sample::Index>(), any::<prop::sample::Index>())
                .prop_map(|(table, slots)| Action::Fork { table, slots }),
            2 => any::<prop::sample::Index>().prop_map(|table| Action::Release { table }),
        ]
    }

    /// A table with what the model would have written through it, checked against simulated memory.
    struct Sequence {
        table: BlockTable,
        tokens: Vec<u32>,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// Random use against a memory that is really written and copied: every sequence reads back its own
        /// tokens, a cached hash always names its content, and nothing leaks.
        #[test]
        fn random_use_keeps_every_invariant(actions in prop::collection::vec(action(), 1..80), total in 1usize..14) {
            let mut manager = BlockManager::new(total, BLOCK_SIZE);
            let mut memory = vec![u32::MAX; total * BLOCK_SIZE];
            let mut sequences: Vec<Sequence> = Vec::new();
            let mut next_token = 1000;
            for action in actions {
                match action {
                    Action::Start { prompt, slots } => {
                        let tokens: Vec<u32> = (0..slots as u32).map(|i| u32::from(prompt) * 100 + i).collect();
                        let chain = hashes(&tokens);
                        let prefix = manager.lookup(&chain).blocks;
                        let mut table = BlockTable::default();
                        let before = manager.available();
                        match manager.start(&mut table, &chain[..prefix], slots) {
                            Ok(()) => {
                                for (position, &token) in tokens.iter().enumerate().skip(prefix * BLOCK_SIZE) {
                                    memory[table.slot(position, BLOCK_SIZE) as usize] = token;
                                }
                                for (index, &hash) in chain.iter().enumerate() {
                                    manager.register(&table, index, hash);
                                }
                                sequences.push(Sequence { table, tokens });
                            }
                            Err(error) => {
                                prop_assert!(error.needed > error.free && table.is_empty());
                                prop_assert_eq!(before, manager.available());
                            }
                        }
                    }
                    Action::Grow { table, by } if !sequences.is_empty() => {
                        let index = table.index(sequences.len());
                        let sequence = &mut sequences[index];
                        let from = sequence.tokens.len();
                        let before = manager.available();
                        match manager.reserve(&mut sequence.table, from, from + by) {
                            Ok(copies) => {
                                for (source, target) in copies {
                                    let start = source as usize * BLOCK_SIZE;
                                    memory.copy_within(start..start + BLOCK_SIZE, target as usize * BLOCK_SIZE);
                                }
                                for position in from..from + by {
                                    memory[sequence.table.slot(position, BLOCK_SIZE) as usize] = next_token;
                                    sequence.tokens.push(next_token);
                                    next_token += 1;
                                }
                            }
                            Err(_) => prop_assert_eq!(before, manager.available()),
                        }
                    }
                    Action::Fork { table, slots } if !sequences.is_empty() => {
                        let source = &sequences[table.index(sequences.len())];
                        let slots = slots.index(source.tokens.len()) + 1;
                        let fork = Sequence { table: manager.fork(&source.table, slots), tokens: source.tokens[..slots].to_vec() };
                        sequences.push(fork);
                    }
                    Action::Release { table } if !sequences.is_empty() => {
                        let mut sequence = sequences.swap_remove(table.index(sequences.len()));
                        manager.release(&mut sequence.table);
                        prop_assert!(sequence.table.is_empty());
                    }
                    _ => {}
                }
                prop_assert_eq!(manager.check(sequences.iter().map(|s| &s.table)), Ok(()));
                for sequence in &sequences {
                    for (position, &token) in sequence.tokens.iter().enumerate() {
                        prop_assert_eq!(memory[sequence.table.slot(position, BLOCK_SIZE) as usize], token);
                    }
                }
                for prompt in 0..3u32 {
                    let tokens: Vec<u32> = (0..24).map(|i| prompt * 100 + i).collect();
                    for (index, hash) in hashes(&tokens).iter().enumerate() {
                        if let Some(&block) = manager.by_hash.get(hash) {
                            let start = block as usize * BLOCK_SIZE;
                            prop_assert_eq!(&memory[start..start + BLOCK_SIZE], &tokens[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE]);
                        }
                    }
                }
            }
            for mut sequence in sequences {
                manager.release(&mut sequence.table);
            }
            prop_assert_eq!(manager.used(), 0);
            prop_assert_eq!(manager.check([]), Ok(()));
        }
    }
}
