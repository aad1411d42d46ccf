//! Compiles the .proto files without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["forge/raft.proto", "forge/cluster.proto", "forge/node.proto", "forge/engine.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().bytes(".").codec_path("crate::codec::LeanCodec").compile_fds(descriptors)?;
    Ok(())
}
