//! How messages become bytes on a stream: as tonic's own codec, but for the memory that an idle stream holds.
//!
//! tonic gives each stream 8 KiB for what it encodes, and as much for what it decodes, for as long as it stands. A
//! coordinator has ten thousand watchers that are told something now and then: here a buffer has the size of the message,
//! and goes when it is sent.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder};
use tonic_prost::{ProstCodec, ProstDecoder};

/// Bytes that a stream holds from the beginning; 5 are a message's header.
const BEGINNING_BYTES: usize = 64;
/// Messages that are ready together are sent together up to this size.
const TOGETHER_BYTES: usize = 32 << 10;

/// See the module.
#[derive(Debug, Clone)]
pub struct LeanCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for LeanCodec<T, U> {
    fn default() -> Self {
        LeanCodec(PhantomData)
    }
}

impl<T: Message + Send + 'static, U: Message + Default + Send + 'static> Codec for LeanCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = LeanEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        LeanEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(BEGINNING_BYTES, TOGETHER_BYTES))
    }
}

/// Encodes into as much memory as the message needs.
#[derive(Debug, Clone)]
pub struct LeanEncoder<T>(PhantomData<T>);

impl<T: Message> Encoder for LeanEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.encoded_len());
        item.encode(buffer).map_err(|error| Status::internal(format!("a message could not be encoded: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BEGINNING_BYTES, TOGETHER_BYTES)
    }
}
