"""The models of the sweep from timm: the smallest variant of each family; and the subset that runs as a test.

A family is the models of one timm module whose names begin with the same letters; its smallest variant has the fewest
parameters. Families whose smallest variant has more than 100 million parameters are left out. For timm 1.0.31.
"""

from __future__ import annotations

TIMM = (
    "bat_resnext26ts", "beit3_base_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224", "botnet26t_256",
    "caformer_s18", "cait_xxs24_224", "coat_tiny", "coatnet_pico_rw_224", "coatnext_nano_rw_224", "convformer_s18",
    "convit_tiny", "convmixer_768_32", "convnext_zepto_rms", "convnextv2_atto", "cpubone_nano", "crossvit_tiny_240",
    "cs3darknet_focus_s", "csatv2", "cspdarknet53", "cspnext_tiny", "cspresnet50", "cspresnext50", "darknet17",
    "darknetaa53", "davit_tiny", "deit_tiny_patch16_224", "densenet121", "densenetblur121d", "dla46x_c", "dm_nfnet_f0",
    "dpn48b", "eca_botnext26ts_256", "eca_nfnet_l0", "eca_resnext26ts", "eca_vovnet39b", "ecaresnet26t",
    "ecaresnetlight", "ecaresnext26t_32x4d", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientnet_lite0", "efficientnetv2_rw_t", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "ese_vovnet19b_slim_dw", "eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8", "fbnetc_100", "fbnetv3_b",
    "flexivit_small", "focalnet_tiny_srf", "gc_efficientnetv2_rw_t", "gcresnet33ts", "gcresnext26ts", "gcvit_xxtiny",
    "gernet_s", "ghostnet_050", "ghostnetv3_050", "gmixer_12_224", "gmlp_ti16_224", "halo2botnet50ts_256", "halonet_h1",
    "haloregnetz_b", "hardcorenas_b", "hgnet_tiny", "hgnetv2_b0", "hiera_tiny_224", "hieradet_small", "hrnet_w18_small",
    "iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4", "lambda_resnet26t",
    "lamhalobotnet50ts_256", "lcnet_035", "lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_128s",
    "lowformer_b0", "mambaout_femto", "maxvit_pico_rw_256", "maxxvit_rmlp_nano_rw_256", "maxxvitv2_nano_rw_256",
    "mixer_s16_224", "mixnet_s", "mnasnet_small", "mobilenet_edgetpu_100", "mobilenetv2_035", "mobilenetv3_small_050",
    "mobilenetv5_base", "mobileone_s1", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "naflexvit_base_patch16_gap",
    "nasnetalarge", "nest_tiny", "nextvit_small", "nf_regnet_b0", "nfnet_l0", "pit_ti_224", "pnasnet5large",
    "poolformer_s12", "poolformerv2_s12", "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetv_040", "regnetx_002",
    "regnety_002", "regnetz_005", "regnetz_b16", "repghostnet_050", "repvgg_a0", "repvit_m1", "res2next50",
    "resmlp_12_224", "resnest14d", "resnet10t", "resnet32ts", "resnetaa34d", "resnetblur18", "resnetrs50",
    "resnetv2_18", "resnext26ts", "resnext50_32x4d", "rexnet_100", "rexnetr_100", "sam2_hiera_tiny",
    "samvit_base_patch16_224", "sebotnet33ts_256", "sedarknet21", "sehalonet33ts", "selecsls42", "semnasnet_050",
    "sequencer2d_s", "seresnet18", "seresnet33ts", "seresnetaa50d", "seresnext26t_32x4d", "seresnext26ts",
    "seresnextaa101d_32x8d", "shvit_s1", "skresnet18", "skresnext50_32x4d", "spnasnet_100", "starnet_s050",
    "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "tf_mixnet_s",
    "tf_mobilenetv3_small_075", "tiny_vit_5m_224", "tinynet_e", "tnt_s_legacy_patch16_224", "tresnet_m",
    "twins_svt_small", "visformer_tiny", "vit_dwee_patch16_reg1_gap_256", "vit_srelpos_small_patch16_224",
    "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "vovnet39a",
    "wide_resnet50_2", "xception41p", "xcit_nano_12_p8_224",
)  # fmt: skip

CI = (
    "torchvision:mobilenet_v3_small", "torchvision:mnasnet0_5", "torchvision:resnet18",
    "torchvision:quantized_resnet18", "timm:test_byobnet", "timm:test_convnext", "timm:test_convnext2",
    "timm:test_efficientnet", "timm:test_efficientnet_gn", "timm:test_efficientnet_ln", "timm:test_mambaout",
    "timm:test_nfnet", "timm:test_resnet", "timm:test_vit", "timm:test_vit3", "timm:test_vit4",
)  # fmt: skip
"""Some that differ, small enough to run as a test."""
