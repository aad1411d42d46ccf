//! The operations of a group of several processes.

use std::ops::Range;
use std::sync::Arc;

use forge_kernels::Backend;
use forge_shared::ids::Epoch;

use super::exchange::Outgoing;
use super::{WiredRank, read};
use crate::fabric::GroupSpec;
use crate::frame::Kind;
use crate::sum::{check_size, tree_sum};
use crate::{Collective, NetError, Result, row_share};

impl<B: Backend> Collective<B> for WiredRank {
    fn rank(&self) -> usize {
        self.own()
    }

    fn size(&self) -> usize {
        self.ranks()
    }

    fn epoch(&self) -> Epoch {
        self.mesh.spec().id.epoch
    }

    fn all_reduce(&self, backend: &B, buffer: &mut B::Buffer, rows: usize) -> Result<()> {
        check_size(self.ranks())?;
        let _turn = self.turn.lock();
        let width = backend.width(buffer);
        if let Some(values) = backend.host_rows_mut(buffer, rows) {
            return self.mesh.or_abort(self.sum(rows, width, values));
        }
        let done = read(backend, buffer, 0..rows).and_then(|mut values| {
            self.sum(rows, width, &mut values)?;
            Ok(backend.write_rows(buffer, 0..rows, &values)?)
        });
        self.mesh.or_abort(done)
    }

    fn all_gather(&self, backend: &B, part: Option<&B::Buffer>, out: &mut B::Buffer, rows: usize) -> Result<()> {
        let _turn = self.turn.lock();
        self.mesh.or_abort(self.gather(backend, part, out, rows))
    }

    fn reduce_scatter(&self, backend: &B, buffer: &B::Buffer, rows: usize, out: &mut B::Buffer) -> Result<Range<usize>> {
        check_size(self.ranks())?;
        let _turn = self.turn.lock();
        self.mesh.or_abort(self.scatter_sum(backend, buffer, rows, out))
    }

    fn broadcast(&self, backend: &B, buffer: &mut B::Buffer, rows: usize, root: usize) -> Result<()> {
        self.check_peer("broadcast", root, false)?;
        let _turn = self.turn.lock();
        self.mesh.or_abort(self.spread(backend, buffer, rows, root))
    }

    fn all_to_all(&self, backend: &B, buffer: &B::Buffer, counts: &[usize], out: &mut B::Buffer) -> Result<Vec<usize>> {
        let size = self.ranks();
        if counts.len() != size {
            let expected = format!("one per rank of the group of {size}");
            return Err(self.mismatch("all_to_all", format!("{} counts", counts.len()), expected));
        }
        let _turn = self.turn.lock();
        self.mesh.or_abort(self.swap(backend, buffer, counts, out))
    }

    fn send(&self, backend: &B, buffer: &B::Buffer, rows: Range<usize>, to: usize) -> Result<()> {
        self.check_peer("send", to, true)?;
        let width = backend.width(buffer);
        let sent = read(backend, buffer, rows.clone())
            .and_then(|values| self.send_rows(Outgoing { rows: rows.len(), width, values: &values }, to));
        self.mesh.or_abort(sent)
    }

    fn recv(&self, backend: &B, buffer: &mut B::Buffer, rows: Range<usize>, from: usize) -> Result<()> {
        self.check_peer("recv", from, true)?;
        let width = backend.width(buffer);
        let mut values = vec![0.0; rows.len() * width];
        let received = self.recv_rows(from, |part| {
            let length = self.same_shape("recv", (rows.len(), width), &part)?;
            part.copy_to(&mut values);
            Ok(length)
        });
        self.mesh.or_abort(received.and_then(|()| Ok(backend.write_rows(buffer, rows, &values)?)))
    }

    fn barrier(&self) -> Result<()> {
        let _turn = self.turn.lock();
        let outgoing = self.to_all(Outgoing { rows: 0, width: 0, values: &[] });
        let came = self.exchange("barrier", Kind::Barrier, &outgoing, &self.others(), |part| self.same_shape("barrier", (0, 0), &part));
        self.mesh.or_abort(came)
    }

    fn abort(&self, reason: &str) {
        self.mesh.abort(reason);
    }

    fn rejoin(&self, epoch: Epoch) -> Result<Arc<dyn Collective<B>>> {
        let spec = self.mesh.spec();
        if epoch <= spec.id.epoch {
            return Err(NetError::OldEpoch { asked: epoch, current: spec.id.epoch });
        }
        self.mesh.abort(&format!("rank {} left for epoch {epoch}", spec.rank));
        let gone = || NetError::Setup { what: "group", reason: "the process ends its data plane".to_owned() };
        let fabric = self.mesh.fabric().ok_or_else(gone)?;
        let mut next: GroupSpec = spec.clone();
        next.id.epoch = epoch;
        Ok(Arc::new(WiredRank::new(fabric.form(next, true)?)))
    }
}

impl WiredRank {
    fn gather<B: Backend>(&self, backend: &B, part: Option<&B::Buffer>, out: &mut B::Buffer, rows: usize) -> Result<()> {
        let (own, width) = (self.own(), backend.width(out));
        let mut parts: Vec<(usize, Vec<f32>)> = vec![(0, Vec::new()); self.ranks()];
        if let Some(part) = part {
            parts[own] = (backend.width(part), read(backend, part, 0..rows)?);
        }
        let (own_width, own_values) = std::mem::take(&mut parts[own]);
        let outgoing = self.to_all(Outgoing { rows, width: own_width, values: &own_values });
        self.exchange("all_gather", Kind::AllGather, &outgoing, &self.others(), |part| {
            // Rows without columns and no rows look alike on the wire.
            if part.width > width || (part.rows != rows && part.width > 0) {
                let expected = format!("{} rows × {} columns (rank {})", part.rows, part.width, part.from);
                return Err(self.mismatch("all_gather", format!("an output of {rows} rows × {width} columns"), expected));
            }
            parts[part.from].0 = part.width;
            parts[part.from].1.extend(part.values());
            Ok(part.rows * part.width)
        })?;
        parts[own] = (own_width, own_values);
        let sum: usize = parts.iter().map(|(width, _)| width).sum();
        if sum != width {
            return Err(self.mismatch("all_gather", format!("an output of {width} columns"), format!("{sum} columns in all")));
        }
        let mut joined = vec![0.0; rows * width];
        let mut start = 0;
        for (own, values) in parts.iter().filter(|(own, _)| *own > 0) {
            for (row, values) in joined.chunks_exact_mut(width).zip(values.chunks_exact(*own)) {
                row[start..start + own].copy_from_slice(values);
            }
            start += own;
        }
        Ok(backend.write_rows(out, 0..rows, &joined)?)
    }

    fn scatter_sum<B: Backend>(&self, backend: &B, buffer: &B::Buffer, rows: usize, out: &mut B::Buffer) -> Result<Range<usize>> {
        let (own, size, width) = (self.own(), self.ranks(), backend.width(buffer));
        let values = read(backend, buffer, 0..rows)?;
        let of_rank = |rank: usize| {
            let share = row_share(rows, rank, size);
            &values[share.start * width..share.end * width]
        };
        let outgoing: Vec<_> = (0..size).map(|rank| (rank != own).then(|| Outgoing::part(rows, width, of_rank(rank)))).collect();
        let share = row_share(rows, own, size);
        let mut parts = vec![vec![0.0; share.len() * width]; size];
        parts[own].copy_from_slice(of_rank(own));
        self.exchange("reduce_scatter", Kind::ReduceScatter, &outgoing, &self.others(), |part| {
            let length = self.same_part("reduce_scatter", (rows, width), share.len() * width, &part)?;
            part.copy_to(&mut parts[part.from]);
            Ok(length)
        })?;
        let mut sum = vec![0.0; share.len() * width];
        tree_sum(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut sum);
        backend.write_rows(out, 0..share.len(), &sum)?;
        Ok(share)
    }

    fn spread<B: Backend>(&self, backend: &B, buffer: &mut B::Buffer, rows: usize, root: usize) -> Result<()> {
        let width = backend.width(buffer);
        if self.own() == root {
            let values = read(backend, buffer, 0..rows)?;
            let outgoing = self.to_all(Outgoing { rows, width, values: &values });
            return self.exchange("broadcast", Kind::Broadcast, &outgoing, &[], |_| Ok(0));
        }
        let mut values = vec![0.0; rows * width];
        self.exchange("broadcast", Kind::Broadcast, &[], &[root], |part| {
            let length = self.same_shape("broadcast", (rows, width), &part)?;
            part.copy_to(&mut values);
            Ok(length)
        })?;
        Ok(backend.write_rows(buffer, 0..rows, &values)?)
    }

    fn swap<B: Backend>(&self, backend: &B, buffer: &B::Buffer, counts: &[usize], out: &mut B::Buffer) -> Result<Vec<usize>> {
        let (own, size, width) = (self.own(), self.ranks(), backend.width(buffer));
        let values = read(backend, buffer, 0..counts.iter().sum())?;
        let of_rank = |rank: usize| {
            let start: usize = counts[..rank].iter().sum();
            &values[start * width..(start + counts[rank]) * width]
        };
        let outgoing: Vec<_> =
            (0..size).map(|rank| (rank != own).then(|| Outgoing { rows: counts[rank], width, values: of_rank(rank) })).collect();
        let mut received = vec![(0, Vec::new()); size];
        let mut announced = counts[own];
        self.exchange("all_to_all", Kind::AllToAll, &outgoing, &self.others(), |part| {
            if part.width != width {
                let expected = format!("{} columns (rank {})", part.width, part.from);
                return Err(self.mismatch("all_to_all", format!("{width} columns"), expected));
            }
            if part.offset == 0 {
                // The peer's word: `out` must have room for it before any of it is kept.
                announced = announced.saturating_add(part.rows);
                backend.write_rows(out, announced..announced, &[])?;
            }
            received[part.from].0 = part.rows;
            received[part.from].1.extend(part.values());
            Ok(part.rows * width)
        })?;
        received[own] = (counts[own], of_rank(own).to_vec());
        let mut at = 0;
        for (rows, values) in &received {
            backend.write_rows(out, at..at + rows, values)?;
            at += rows;
        }
        Ok(received.into_iter().map(|(rows, _)| rows).collect())
    }
}
